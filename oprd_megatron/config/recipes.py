"""Presets: `recipe: NAME` stands for the settings below; what the file itself says goes first. `oprd config FILE` prints what
a file with a recipe comes to. Optimizer, rollouts and models are not part of a recipe: the schema's defaults are the
paper's."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from oprd_megatron.errors import ConfigError

HALF_WAY = [[0.0, 1.0], [0.5, 1.0], [0.5, 0.0]]
THEN_ON = [[0.5, 0.0], [0.5, 1.0]]
BRIDGE = {"mode": "low_rank", "normalize": "l2", "positions": "last_k", "k": 2000}
TOP_16 = {"kind": "topk", "k": 16, "support": "student", "rest": "renormalize"}

RECIPES: dict[str, dict[str, Any]] = {
    # Eq. 6, raw squared error, the last 2000 tokens
    "oprd_vanilla": {
        "distill": {"mode": "identity", "normalize": "none", "positions": "last_k", "k": 2000, "coefficient": 1.0}
    },
    # Eq. 14 through distill.bridge
    "oprd_bridge": {"distill": {**BRIDGE, "coefficient": 100.0}},
    # Eq. 2 and 3
    "opd_sampled": {"distill": {"mode": "none"}, "output": {"terms": [{"kind": "sampled"}]}},
    # Eq. 5
    "opd_topk": {"distill": {"mode": "none"}, "output": {"terms": [TOP_16]}},
    # Eq. 4
    "opd_full": {"distill": {"mode": "none"}, "output": {"terms": [{"kind": "full", "divergence": "reverse"}]}},
    # Eq. 7; distill.coefficient is mu
    "oprd_plus_opd": {
        "distill": {"mode": "identity", "normalize": "none", "positions": "last_k", "k": 2000, "coefficient": 1.0},
        "output": {"terms": [TOP_16]},
    },
    # through the bridge for the first half of the run, then OPD, which also trains the LM head
    "two_stage": {
        "distill": {**BRIDGE, "coefficient": [[place, 100 * weight] for place, weight in HALF_WAY]},
        "output": {"terms": [{"kind": "full", "divergence": "reverse", "weight": THEN_ON}]},
    },
}


def expand(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A run's values with its `recipe`, if it names one, filled in.

    Raises:
        ConfigError: there is no such recipe.
    """
    if "recipe" not in values:
        return values
    rest = {key: value for key, value in values.items() if key != "recipe"}
    name = values["recipe"]
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=1, cutoff=0.0)
        raise ConfigError(f"{source}: recipe: no {name!r}; did you mean {near[0]!r}? (there are {', '.join(RECIPES)})")
    return _filled(rest, copy.deepcopy(RECIPES[name]))


def _filled(given: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """`given`, with what only `preset` has; sections are filled in key by key, lists are taken whole."""
    filled = dict(given)
    for key, value in preset.items():
        if key not in filled or filled[key] is None:
            filled[key] = value
        elif isinstance(filled[key], dict) and isinstance(value, dict):
            filled[key] = _filled(filled[key], value)
    return filled
