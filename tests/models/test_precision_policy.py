"""The policy table: every recipe on every machine, with every width, layout and choice of layers, is allowed or refused as the
table in parallel/precision.py says, in one line that says what to do."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints_conversion import Architecture, read_architecture
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.errors import ConfigError, UserError
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.memory import ModelMemory
from oprd_megatron.parallel.precision import (
    Machine,
    check_precision,
    kept_layers,
    mcore_settings,
    widths_on_a_rank,
)
from oprd_megatron.representation.placement import arrange
from tests.tiny_models import tiny_hf_model

HOPPER, BLACKWELL = (9, 0), (10, 0)
MACHINES = [None, (7, 5), (8, 9), HOPPER, BLACKWELL, (12, 0)]
LINEARS = [("fp8", recipe) for recipe in ("tensorwise", "blockwise", "delayed", "mxfp8")] + [("weight_only", None)]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Four layers, 8 heads of 32 in 4 groups, whose sizes tests change."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_hf_model("llama", folder, hidden_size=256, heads=8, kv_heads=4, ffn=512)
    return read_architecture(folder)


def layout(tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, sp: bool = False, at: int = 0) -> GridLayout:
    return GridLayout(tp, pp, dp, sp, (4 // pp,) * pp, first_rank=at, cp=cp)


def refused(
    precision: PrecisionConfig, architecture: Architecture, mine: GridLayout, other: GridLayout, machine: Machine | None
) -> str:
    """What is said, or nothing."""
    try:
        check_precision("teacher", precision, architecture, mine, other, machine)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("teacher.precision") and "; " in str(error)
        return str(error)
    return ""


WIDTHS = {  # ffn -> what its share on two ranks is a multiple of
    2048: 128, 2112: 32, 2080: 16, 2064: 8,
}  # fmt: skip


@pytest.mark.parametrize(("linear", "recipe"), LINEARS)
def test_every_combination(architecture: Architecture, linear: Any, recipe: Any) -> None:
    """Machine x TE x widths x layers that stay x grids: allowed exactly where all of the recipe's conditions hold."""
    least = {"tensorwise": HOPPER, "blockwise": HOPPER, "delayed": HOPPER, "mxfp8": BLACKWELL, None: (0, 0)}[recipe]
    multiple = {"tensorwise": 16, "blockwise": 128, "delayed": 16, "mxfp8": 32, None: 32}[recipe]
    grids = {
        "alike": (layout(tp=2), layout(tp=2)),
        "disjoint": (layout(tp=2), layout(tp=2, at=2)),
        "other tp": (layout(tp=2, dp=2), layout(tp=4)),
        "pp": (layout(tp=2, pp=2), layout(tp=2, pp=2)),
        "sp and cp": (layout(tp=2, cp=2, sp=True), layout(tp=2, cp=2)),
    }
    keeps: list[dict[str, Any]] = [{}, {"first_layers": 1}, {"last_layers": 1}, {"keep_layers": [2]}]
    seen = {True: 0, False: 0}
    for capability, has_te, ffn, keep, grid in itertools.product(MACHINES, (True, False), WIDTHS, keeps, grids):
        chosen: dict[str, Any] = {"linear": linear, **({"recipe": recipe} if recipe else {}), **keep}
        if recipe == "delayed" and keep:
            with pytest.raises(ValueError, match="delayed needs every layer"):
                PrecisionConfig(**chosen)
            continue
        has_machine = linear == "weight_only" or (has_te and capability is not None and capability >= least)
        has_grids = recipe != "delayed" or grid in ("alike", "sp and cp")
        allowed = has_machine and has_grids and WIDTHS[ffn] % multiple == 0
        said = refused(
            PrecisionConfig(**chosen),
            replace(architecture, ffn_hidden_size=ffn),
            *grids[grid],
            Machine(capability, has_te),
        )
        assert (said == "") == allowed, (capability, has_te, ffn, keep, grid, said)
        seen[allowed] += 1
    assert min(seen.values()) > 0


@pytest.mark.parametrize(
    ("machine", "recipe", "said"),
    [
        (Machine(None, True), "tensorwise", "fp8 needs a GPU, and there is none; use one or linear: weight_only"),
        (Machine((8, 9), True), "tensorwise", "compute capability 9.0, and this one has 8.9; use another GPU"),
        (Machine(HOPPER, False), "tensorwise", "fp8 needs Transformer Engine, which is not installed"),
        (Machine(HOPPER, True), "mxfp8", "compute capability 10.0, and this one has 9.0; use recipe: tensorwise"),
    ],
)
def test_the_machine_is_named(architecture: Architecture, machine: Machine, recipe: Any, said: str) -> None:
    """What is missing, and what would do instead."""
    precision = PrecisionConfig(linear="fp8", recipe=recipe)
    assert said in refused(precision, architecture, layout(), layout(), machine)


def test_every_width_counts(architecture: Architecture) -> None:
    """Each width of a rank's matrices is checked and named; a plan without a machine checks them too."""
    odd = {
        "hidden_size": replace(architecture, hidden_size=264),
        "attention heads": replace(architecture, head_dim=2),
        "ffn_hidden_size": replace(architecture, ffn_hidden_size=504),
    }
    for what, changed in odd.items():
        for precision in (PrecisionConfig(linear="fp8"), PrecisionConfig(linear="weight_only")):
            said = refused(precision, changed, layout(tp=2), layout(), None)
            assert f"teacher.precision: {what}" in said and said.endswith("lower tp")
    assert "use recipe: tensorwise" in refused(
        PrecisionConfig(linear="fp8", recipe="blockwise"),
        replace(architecture, ffn_hidden_size=528),
        layout(),
        layout(),
        Machine(HOPPER, True),
    )


def test_padded_heads_count(architecture: Architecture) -> None:
    """Groups that tp does not divide are padded before a rank's share is taken."""
    nine = replace(architecture, num_attention_heads=9, num_query_groups=3)
    assert 2 * 3 * 32 in widths_on_a_rank(nine, 2).values()


def test_which_layers_stay(tmp_path: Path) -> None:
    """Ends, named layers and the worst of a measurement together; all of a model that is not quantised."""
    file = tmp_path / "noise.json"
    file.write_text(json.dumps({"worst": [7, 3, 5], "layers": {}, "teacher": "t"}))
    precision = PrecisionConfig(
        linear="weight_only", first_layers=1, last_layers=2, keep_layers=[4], keep_worst=2, noise=file
    )
    assert kept_layers(precision, 10) == {1, 9, 10, 4, 7, 3}
    assert kept_layers(PrecisionConfig(), 3) == {1, 2, 3}
    with pytest.raises(ConfigError, match="more than 6 layers"):
        kept_layers(precision, 6)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read; write it with"):
        kept_layers(precision, 10)


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ({"linear": "weight_only", "keep_layers": [5]}, "keep_layers: 5 of 4 layers"),
        ({"linear": "weight_only", "first_layers": 4}, "every layer stays in dtype"),
        ({"linear": "fp8", "first_layers": 3}, "first_layers: 3 is more than a stage's 2 layers"),
    ],
)
def test_impossible_layers(architecture: Architecture, precision: dict[str, Any], said: str) -> None:
    """Layers that the model does not have, all of them, and more at an end than mcore keeps."""
    pipeline = layout(pp=2)
    assert said in refused(PrecisionConfig(**precision), architecture, pipeline, pipeline, None)


def test_mcore_settings() -> None:
    """A frozen model holds e4m3 weights once; a student computes in hybrid and keeps bf16 parameters; nothing else says fp8."""
    assert mcore_settings(PrecisionConfig(), True) == mcore_settings(PrecisionConfig(linear="weight_only"), True) == {}
    precision = PrecisionConfig(linear="fp8", recipe="blockwise", last_layers=2)
    assert mcore_settings(precision, frozen=True) == {
        "fp8": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 2,
    }
    trained = mcore_settings(PrecisionConfig(linear="fp8"), frozen=False)
    assert (trained["fp8"], trained["fp8_param"], trained["first_last_layers_bf16"]) == ("hybrid", False, False)


@pytest.mark.parametrize(("sp", "cp"), [(False, 1), (True, 1), (True, 2)])
def test_tokens_are_filled_up(sp: bool, cp: int) -> None:
    """What each rank multiplies has a multiple of 16 tokens, with sequence parallelism also before it is gathered."""
    grid = replace(layout(tp=2, cp=cp, sp=sp), token_multiple=16)
    for row in arrange([5, 17, 30, 1], grid, micro_batch_size=2).packs:
        assert all(pack.length % (16 * cp * (2 if sp else 1)) == 0 for pack in row)


SEVENTY_TWO = dict(num_layers=80, hidden_size=8192, ffn_hidden_size=29568, num_attention_heads=64, num_query_groups=8)


@pytest.mark.parametrize("linear", ["fp8", "weight_only"])
def test_plan_of_a_large_teacher(architecture: Architecture, linear: Any) -> None:
    """Qwen2.5-72B's shape: at most 0.55 of bf16 with its embedding in bf16, with or without the head."""
    large = replace(architecture, **SEVENTY_TWO, head_dim=128, vocab_size=152064, tie_word_embeddings=False)
    grid = GridLayout(8, 1, 1, False, (80,))
    sizes = {}
    for precision, has_head in itertools.product((PrecisionConfig(), PrecisionConfig(linear=linear)), (True, False)):
        memory = ModelMemory(large, grid, "bf16", 0, trained=False, precision=precision, has_head=has_head)
        sizes[precision.linear, has_head] = memory.stages(1, 1)[0].weights * 8
    assert 144e9 < sizes["dtype", True] < 147e9
    assert sizes[linear, True] <= 0.54 * sizes["dtype", True]
    assert sizes[linear, False] <= 0.52 * sizes["dtype", True]
