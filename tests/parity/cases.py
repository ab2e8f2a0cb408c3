"""The parity matrix: layouts of teacher and student, and what else a case sets.

Written as "teacher > student": `tp2sp pp2 > cp2 dp2` gives the teacher tp 2 with sequence parallelism and pp 2. A case holds
every rank of its world, or names the ranks of each model (`@0-3`). Words after a bar set the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

from oprd_megatron.config.output import OutputConfig
from oprd_megatron.config.schema import DistillConfig, ParallelConfig, RecomputeConfig

PAIRS = {
    # name: (family, tied, teacher (layers, width), student (layers, width))
    "deep": ("llama", True, (5, 32), (4, 32)),
    "eight": ("qwen3", False, (8, 32), (8, 32)),
    "shallow": ("llama", False, (2, 64), (2, 64)),
    "wide": ("qwen2", True, (6, 64), (4, 32)),  # needs a bridge or a trained map
    "padded": ("llama", False, (5, 32), (4, 32)),  # the teacher has more ids than the student
    "experts": ("qwen3_moe", False, (5, 32), (4, 32)),
    "mixtral": ("mixtral", True, (8, 32), (4, 32)),
}
VOCAB = 300
TEACHER_VOCAB = {"padded": 400}
DISTILL = {
    "raw": {"positions": "all"},
    "l2": {"normalize": "l2", "positions": "last_k", "k": 3, "coefficient": 100.0},
    "pre": {"layers": "odd", "positions": "first_k", "k": 4, "position_anchor": "predictor", "final_state": "pre_norm"},
}
BRIDGE_RANK = 6
MODES: dict[str, dict[str, Any]] = {
    "linear": {"mode": "linear"},
    "rank": {"mode": "low_rank"},
    "mlp": {"mode": "low_rank"},
    "residual": {"mode": "low_rank_residual", "bridge_head": 2},
    "depth": {"layer_weights": "depth"},
    "listed": {"layer_weights": [0.0, 2.0, 1.0, 0.5], "final_layer_weights": "depth"},
    "opd": {},
    "opdonly": {"coefficient": 0.0},
    "top": {},
    "unions": {},
    "few": {},
    "several": {"coefficient": [[0.0, 1.0], [1.0, 0.2]]},
    "nostates": {"mode": "none"},
}
"""What stage 2 adds; a case may have several of them."""
TERMS: dict[str, list[dict[str, Any]]] = {
    "opd": [{"kind": "full", "name": "opd", "weight": 0.7}],
    "opdonly": [{"kind": "full", "name": "opdonly", "weight": 1.5}],
    "top": [{"kind": "topk", "name": "top", "k": 4}],
    "unions": [
        {"kind": "topk", "name": "union", "k": 5, "support": "union", "rest": "tail"},
        {"kind": "topk", "name": "intersection", "k": 40, "support": "intersection", "weight": 3.0},
    ],
    "few": [
        {"kind": "sampled", "name": "drawn", "weight": 0.5},
        {"kind": "topk", "name": "theirs", "k": 6, "support": "teacher", "rest": "tail", "positions": "last",
         "temperature": 0.5},
        {"kind": "sampled", "name": "ratio", "estimator": "k3", "positions": "first_k", "first_or_last": 4, "weight": 0.2},
    ],
    "several": [
        {"kind": "full", "name": "forward", "divergence": "forward", "temperature": 2.0, "positions": "last_k",
         "first_or_last": 5, "weight": [[0.0, 2.0], [1.0, 0.5]]},
        {"kind": "full", "name": "between", "divergence": "jensen_shannon", "mixing": 0.3, "weight": 2.0},
        {"kind": "sampled", "name": "square", "estimator": "k2", "weight": [[0.0, 0.0], [0.5, 1.0]]},
    ],
    "nostates": [
        {"kind": "full", "name": "alone"},
        {"kind": "topk", "name": "within", "k": 8, "support": "teacher", "positions": "last_k", "first_or_last": 3},
    ],
}  # fmt: skip
"""Output-space terms that a mode adds."""
TEACHER_HEAD = {"few": "teacher", "opdonly": "student"}


@dataclass(frozen=True)
class Case:
    """One cell of the matrix."""

    text: str
    world: int
    teacher: ParallelConfig
    student: ParallelConfig
    pair: str = "deep"
    distill: str = "raw"
    modes: tuple[str, ...] = ()
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    micro_batch_tokens: int | None = None
    distributed: bool = False
    spool_bytes: int | None = None

    def distill_config(self, bridge: str | None) -> DistillConfig:
        keys: dict[str, Any] = dict(DISTILL[self.distill])
        for mode in self.modes:
            keys |= MODES[mode]
        return DistillConfig(**keys, bridge=bridge, spool_bytes=self.spool_bytes)

    @property
    def output_config(self) -> OutputConfig:
        """Logits of five tokens at a time, so that every case has several chunks."""
        terms = [term for mode in self.modes for term in TERMS.get(mode, [])]
        heads = [TEACHER_HEAD[mode] for mode in self.modes if mode in TEACHER_HEAD]
        return OutputConfig.model_validate({"terms": terms, "chunk_tokens": 5, "teacher_head": [*heads, "auto"][0]})

    @property
    def has_bridge(self) -> bool:
        _, _, teacher, student = PAIRS[self.pair]
        return {"linear", "nostates"}.isdisjoint(self.modes) and (
            teacher[1] != student[1] or not {"rank", "mlp", "residual"}.isdisjoint(self.modes)
        )

    @property
    def key(self) -> str:
        """Of the reference: cases with the same one differ in layout only."""
        return "_".join([self.pair, self.distill, *sorted(self.modes)])


def parse(text: str) -> Case:
    """A case from its line."""
    layouts, _, options = text.partition("|")
    teacher, student = (_layout(side) for side in layouts.split(">"))
    settings: dict[str, Any] = {}
    for word in options.split():
        key, _, value = word.partition("=")
        if word in PAIRS:
            settings["pair"] = word
        elif word in DISTILL:
            settings["distill"] = word
        elif word in MODES:
            settings["modes"] = (*settings.get("modes", ()), word)
        elif key == "full":
            method, _, count = value.partition(":")
            settings["recompute"] = RecomputeConfig(
                granularity="full", method=method or "uniform", num_layers=int(count or 1)
            )  # type: ignore[arg-type]
        elif word == "selective":
            settings["recompute"] = RecomputeConfig(granularity="selective")
        elif word == "distributed":
            settings["distributed"] = True
        elif key == "pack":
            settings["micro_batch_tokens"] = int(value)
        else:
            assert key == "spool", word
            settings["spool_bytes"] = int(value)
    ends = [last for last in (_last_rank(teacher), _last_rank(student)) if last]
    world = max(ends) + 1 if ends else _size(student)
    return Case(" ".join(text.split()), world, teacher, student, **settings)


def _layout(text: str) -> ParallelConfig:
    keys: dict[str, Any] = {"dp": 1}
    for word in text.split():
        if word.startswith("@"):
            keys["ranks"] = word[1:]
        elif word == "follow":
            keys["layers_per_stage"] = "follow_student"
        elif word.startswith("["):
            keys["layers_per_stage"] = [int(n) for n in word[1:-1].split(",")]
        else:
            match = re.fullmatch(r"(tp|cp|pp|vpp|dp|first|last)(\d+)(sp)?", word)
            assert match, word
            name = {"first": "first_stage_layers", "last": "last_stage_layers"}.get(match[1], match[1])
            keys[name] = int(match[2])
            if match[3]:
                keys["sp"] = True
    return ParallelConfig(**keys)


def _size(layout: ParallelConfig) -> int:
    return layout.tp * layout.cp * layout.pp * (layout.dp or 1)


def _last_rank(layout: ParallelConfig) -> int:
    return int(layout.ranks.split("-")[1]) if layout.ranks else 0


MATRIX = [
    # one rank
    "dp1 > dp1", "dp1 > dp1 | l2 full", "dp1 > dp1 | wide pre", "dp1 > dp1 | pack=30 spool=20000",
    # two ranks: every pair of unequal tp and pp, and of the other axes
    "tp2 > pp2", "pp2 > tp2 | l2", "tp2sp > pp2 | pre", "pp2 > tp2sp", "tp2 > dp2 | eight", "dp2 > tp2 | eight l2",
    "pp2 > dp2 | distributed", "dp2 > pp2 | shallow", "cp2 > tp2", "tp2 > cp2", "cp2 > pp2 | l2", "pp2 > cp2 | eight",
    "cp2 > dp2 | pre", "dp2 > cp2 | distributed", "cp2 > cp2 | eight full", "tp2 > tp2sp", "tp2sp > tp2 | eight",
    "dp1 @0-0 > dp1 @1-1", "dp1 @1-1 > dp1 @0-0 | wide", "tp2 > tp2 | wide", "pp2 > pp2 | wide full",
    "cp2 > dp2 | wide l2", "pp2 vpp2 > pp2 vpp2", "pp2 > pp2 vpp2 | eight pre", "pp2 vpp2 > pp2 | eight",
    "tp2 > pp2 vpp2 | full", "dp2 > dp2 | pack=40", "pp2 [4,1] > pp2 [1,3]", "pp2 follow > pp2 first1 | eight",
    "tp2 > pp2 | shallow full", "dp2 > pp2 vpp2 | pack=24 eight",
    # four ranks
    "tp4 > pp4 | eight", "pp4 > tp4 | eight l2", "tp4sp > tp2 dp2 | eight", "tp2 pp2 > dp4 | eight",
    "dp4 > tp2sp pp2 | eight", "cp4 > tp2 cp2", "tp2 cp2 > cp4 | distributed", "tp2sp cp2 > pp2 cp2 | pre",
    "pp2 cp2 > tp2sp cp2 | full=block:1", "tp2 @0-1 > pp2 @2-3", "pp2 @2-3 > tp2sp @0-1 | l2",
    "cp2 @0-1 > dp2 @2-3 | distributed", "dp1 @0-0 > pp3 [1,1,2] @1-3", "pp3 [1,3,2] @0-2 > dp1 @3-3 | wide",
    "tp2 @0-1 > dp2 @2-3 | pack=30 spool=7000", "pp2 dp2 > tp2 dp2 | distributed",
    "pp2 vpp2 dp2 > tp2 pp2 vpp2 | eight", "tp2sp pp2 > pp2 vpp3 [1,1,2,1,2,1] dp2 | eight full",
    "pp4 > pp4 vpp2 | eight", "tp2 pp2 > tp2sp pp2 | wide selective",
    "pp2 cp2 > pp2 vpp2 cp2 | eight full=uniform:2 pack=40", "dp4 > dp4 | distributed pack=30",
    "tp4sp > pp2 dp2 last1 | wide distributed", "pp4 follow > pp2 cp2 | eight l2",
    "tp2 cp2 > tp2 cp2 | selective spool=9000",
    # experts: their student has tensor parallelism only with sequence parallelism
    "dp1 > dp1 | experts full", "tp2sp > pp2 | experts pre", "pp2 > tp2sp | experts l2", "tp2 > tp2sp | mixtral",
    "cp2 > dp2 | experts distributed", "dp2 > cp2 | mixtral selective", "pp2 vpp2 > pp2 vpp2 | mixtral full",
    "tp2sp pp2 > tp2sp dp2 | experts distributed", "tp2sp cp2 > tp2sp pp2 vpp2 | experts full pack=40",
    "tp2 pp2 > tp4sp | mixtral distributed", "dp4 > tp2sp cp2 | experts full=block:1",
    # eight ranks
    "tp4sp pp2 > tp2 pp2 dp2 | eight", "tp2 pp2 cp2 > tp2sp pp2 vpp2 dp2 | eight full",
    "tp4 @0-3 > tp2 dp2 @4-7 | eight", "pp4 vpp2 @4-7 > tp2sp cp2 @0-3 | eight l2",
    "tp2sp pp2 cp2 > dp8 | eight distributed", "pp8 > tp4sp dp2 | eight pre", "dp8 > pp4 vpp2 dp2 | eight pack=50",
    "tp2 pp2 dp2 > cp2 tp2sp pp2 | wide full=block:1 distributed",
    "tp4sp @0-3 > pp2 vpp2 cp2 @4-7 | eight spool=12000 full", "tp2 cp4 > tp4sp cp2 | eight",
]  # fmt: skip

FOUR = ["dp4", "pp2 dp2", "pp4", "tp2 dp2", "tp2 pp2", "tp4"]
"""Every (tp, pp) of four ranks; the matrix has every pair of unequal ones."""

PAIRED = [f"{a} > {b} | eight" for a, b in permutations(FOUR, 2) if f"{a} > {b} | eight" not in MATRIX]
CASES = [parse(text) for text in [*MATRIX, *PAIRED]]

EACH_MODE = [
    "linear", "wide linear", "rank", "wide mlp", "wide residual l2", "depth", "wide listed", "opd", "eight opdonly",
    "padded opd linear", "wide mlp listed opd", "top", "padded depth unions", "few", "wide linear few", "rank listed several",
    "nostates", "wide nostates top",
]  # fmt: skip
IN_EACH = [
    "dp1 > dp1 |", "tp2 > tp2 |", "tp2sp > tp2sp |", "pp2 > pp2 | full", "dp2 > dp2 |", "dp2 > dp2 | distributed",
    "cp2 > cp2 |", "pp2 vpp2 > pp2 vpp2 |", "tp2 > pp2 |", "cp2 > tp2sp | full", "dp2 > tp2 | pack=40",
    "dp1 @0-0 > dp1 @1-1 |", "tp2 @0-1 > pp2 @2-3 |", "pp2 dp2 > tp2sp pp2 | distributed", "tp2 cp2 > tp2 dp2 | pack=40",
]  # fmt: skip
FURTHER = [
    "dp1 > dp1 | wide linear pre", "tp2 > tp2 | wide linear l2 full", "tp4 > tp2sp cp2 | wide linear",
    "tp2sp > tp2sp | experts linear",
    "pp2 > dp2 | wide linear spool=30000", "tp2 > dp2 | padded opd spool=20000", "pp2 vpp2 > tp2sp | experts opd",
    "tp4sp > pp4 | eight opd", "pp2 > tp2 | residual full", "cp2 > dp2 | rank pre",
    "tp2 @2-3 > dp2 @0-1 | wide mlp pack=30",
    "dp2 > pp2 vpp2 | padded opdonly full", "tp2sp pp2 > cp2 dp2 | opd l2", "dp4 > tp4 | eight depth opdonly",
    "dp1 @1-1 > dp1 @0-0 | padded few", "tp2sp @0-1 > cp2 @2-3 | padded several",
    "pp2 @2-3 > tp2sp @0-1 | wide mlp few spool=9000",
    "dp1 @0-0 > pp3 [1,1,2] @1-3 | unions", "cp2 @0-1 > tp2sp @2-3 | nostates spool=9000", "tp2sp > tp2sp | experts few",
    "pp2 vpp2 > dp2 | eight nostates pack=30",
]  # fmt: skip
MODE_CASES = [
    *(parse(f"{layout} {mode}") for mode, layout in product(EACH_MODE, IN_EACH)),
    *(parse(text) for text in FURTHER),
]
"""Every mode in every kind of layout."""
