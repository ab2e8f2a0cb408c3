"""Weights alone in fp8: what is stored, that layouts do not matter, that a model computes with exactly that, and its bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints_conversion import read_architecture
from oprd_megatron.config import parse_config
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.errors import LayoutError, TeacherWeightsError
from oprd_megatron.models import Model, build_model
from oprd_megatron.models.residence import Residence
from oprd_megatron.models.weight_only import FP8, dequantise, power_of_two, quantise, weight_only_modules
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.parallel.memory import ModelMemory
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from tests.live_bytes import LiveBytes
from tests.models.test_parity import LAYOUTS, TOLERANCE, VOCAB, assert_parity, build, ragged_texts
from tests.ranks import run_ranks
from tests.tiny_models import Family, tiny_hf_model
from tests.training.runs import changed

PRECISION = PrecisionConfig(linear="weight_only")
SHAPE: dict[str, Any] = dict(hidden_size=64, heads=4, kv_heads=2, ffn=128)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantised(weight: torch.Tensor) -> torch.Tensor:
    """What is computed with, in the weight's dtype."""
    return dequantise(*quantise(weight), weight.dtype)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), exponent=st.integers(-60, 60), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_rounding(seed: int, exponent: int, dtype: torch.dtype) -> None:
    """Every weight is off by at most 2^-4 of itself, or by half the smallest step of its block; again changes nothing."""
    weight = (torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    weight[2] = 0
    numbers, exponents = quantise(weight)
    assert numbers.dtype == FP8 and exponents.dtype == torch.uint8 and exponents.shape == (5, 3)
    made = dequantise(numbers, exponents, dtype)
    step = power_of_two(exponents).repeat_interleave(32, dim=1) * 2.0**-9
    assert bool(((made.float() - weight.float()).abs() <= torch.maximum(weight.float().abs() / 16, step / 2)).all())
    largest = numbers.float().abs().unflatten(-1, (-1, 32)).amax(-1)
    assert bool(((largest > 208) | (largest == 0)).all()) and float(largest.max()) <= 448
    assert torch.equal(quantised(made), made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_weights_come_back(dtype: torch.dtype) -> None:
    """All e4m3 numbers times powers of two come back bit for bit, and in bf16 no second rounding happens."""
    every = torch.arange(256, dtype=torch.uint8).view(FP8).to(torch.float32)
    every = every[every.isfinite()].to(dtype)
    rows = torch.stack([every[:224], every[-224:].flip(0)])
    rows[:, ::32] = 448.0  # of each block the largest, so that nothing falls below the smallest step
    for exponent in (-20, 0, 7):
        assert torch.equal(quantised(rows * 2.0**exponent), rows * 2.0**exponent)


def test_a_block_depends_on_itself_alone() -> None:
    """Any cut of rows, and any cut of columns at whole blocks, stores what the whole matrix stores there."""
    weight = torch.randn(12, 192) * torch.logspace(-3, 2, 192)
    numbers, exponents = (part.view(torch.uint8) for part in quantise(weight))
    for rows, blocks in ((slice(0, 6), slice(0, 3)), (slice(3, 12), slice(2, 6))):
        columns = slice(32 * blocks.start, 32 * blocks.stop)
        mine = quantise(weight[rows, columns])
        assert torch.equal(mine[0].view(torch.uint8), numbers[rows, columns])
        assert torch.equal(mine[1], exponents[rows, blocks])


def rounded_directory(source: Path, out: Path, kept: tuple[int, ...] = ()) -> Path:
    """The model with the weights of its linear layers rounded as they are stored; of layers `kept` (1-based) they are not."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name.endswith("weight") and parts[-2] in (*LINEAR, "w1", "w2", "w3") and int(parts[2]) + 1 not in kept:
            tensors[name] = quantised(tensor)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_equals_transformers_on_what_is_stored(tmp_path: Path, layout: str, family: Family) -> None:
    """In every layout, states and logits equal transformers' with the rounded weights: scales do not depend on the layout."""
    tiny_hf_model(family, tmp_path / "hf", tied=family == "llama", vocab_size=VOCAB, std=0.1, **SHAPE)
    expected = rounded_directory(tmp_path / "hf", tmp_path / "rounded")
    texts = ragged_texts([10, 3, 7, 1], VOCAB)
    assert_parity(tmp_path / "hf", LAYOUTS[layout], texts, False, VOCAB, TOLERANCE, PRECISION, expected)


@pytest.mark.parametrize("family", ["gemma3_text", "mixtral", "qwen3_moe"])
def test_every_kind_of_layer(tmp_path: Path, family: Family) -> None:
    """Norms on outputs, and experts one after the other; of two layers that stay in dtype no weight is rounded."""
    tiny_hf_model(family, tmp_path / "hf", vocab_size=VOCAB, std=0.1, **SHAPE)
    expected = rounded_directory(tmp_path / "hf", tmp_path / "rounded", kept=(1, 3))
    precision = PrecisionConfig(linear="weight_only", first_layers=1, keep_layers=[3])
    texts = ragged_texts([6, 9], VOCAB)
    assert_parity(tmp_path / "hf", LAYOUTS["single"], texts, False, VOCAB, 4 * TOLERANCE, precision, expected)


def test_padded_heads(tmp_path: Path) -> None:
    """Three groups on two ranks: the padding is zero, and nothing else changes."""
    shape = {**SHAPE, "hidden_size": 96, "heads": 6, "kv_heads": 3}
    tiny_hf_model("llama", tmp_path / "hf", vocab_size=VOCAB, std=0.1, **shape)
    expected = rounded_directory(tmp_path / "hf", tmp_path / "rounded")
    texts = ragged_texts([5, 8], VOCAB)
    assert_parity(tmp_path / "hf", LAYOUTS["tp2sp"], texts, True, VOCAB, TOLERANCE, PRECISION, expected)


def stored(hf_dir: Path, layout: str) -> dict[str, Any]:
    """On a rank: bytes of all storages of the model, and kinds of linear weights."""
    model = build(hf_dir, LAYOUTS[layout], precision=PRECISION)
    tensors = [tensor for chunk in model.chunks for tensor in (*chunk.parameters(), *exponents(model))]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    kinds = {module.weight.dtype for module in weight_only_modules(model.chunks)}
    return {"bytes": sum(sizes.values()), "kinds": kinds, "pp": model.grid.coords.pp, "layout": model.grid.layout}


def exponents(model: Model) -> list[torch.Tensor]:
    return [module.exponents for module in weight_only_modules(model.chunks)]


@pytest.mark.parametrize("layout", ["single", "tp2", "pp2vpp2"])
def test_memory_is_the_plans(tmp_path: Path, layout: str) -> None:
    """Every rank stores what the plan says to the byte; weights of linear layers are in fp8."""
    tiny_hf_model("qwen3", tmp_path, tied=False, vocab_size=VOCAB, std=0.1, **SHAPE)
    parallel = LAYOUTS[layout]
    for rank in run_ranks(parallel.tp * parallel.pp, stored, tmp_path, layout):
        memory = ModelMemory(read_architecture(tmp_path), rank["layout"], "fp32", 0, False, precision=PRECISION)
        assert rank["bytes"] == memory.stages(1, 1)[rank["pp"]].weights
        assert rank["kinds"] == {FP8}


def on_one_rank(hf_dir: Path, **keywords: Any) -> Model:
    platform, architecture = select_platform("cpu"), read_architecture(hf_dir)
    with platform.scope():
        grid = build_grid(GridLayout(1, 1, 1, False, (architecture.num_layers,)))
        init_mcore_globals(0, 0)
    keywords = {"dtype": torch.bfloat16, "hf_dir": hf_dir, "frozen": True, "head": False, **keywords}
    return build_model(architecture, grid, platform, **keywords)


def loaded(hf_dir: Path) -> dict[str, int]:
    """Bytes that loading in bf16 and in fp8 leaves, and the most that there were while loading in fp8."""
    found = {}
    for name, precision in (("bf16", PrecisionConfig()), ("fp8", PRECISION)):
        with LiveBytes() as bytes_:
            model = on_one_rank(hf_dir, precision=precision)
        found |= {name: bytes_.live, f"{name} peak": bytes_.peak}
        largest = max(parameter.numel() for parameter in model.chunks[0].decoder.parameters())
        del model
    return {**found, "largest": largest}


def test_half_the_memory(tmp_path: Path) -> None:
    """At most 0.55 of bf16 with the embedding (in bf16, here a fiftieth of the numbers) and without a head; while loading, a
    few times one matrix more, never a model in bf16."""
    tiny_hf_model("llama", tmp_path, tied=False, vocab_size=VOCAB, num_layers=12, hidden_size=128, ffn=512, heads=4)
    (found,) = run_ranks(1, loaded, tmp_path)
    assert found["fp8"] <= 0.55 * found["bf16"]
    assert found["fp8 peak"] - found["fp8"] <= 16 * found["largest"] < 0.4 * found["bf16"]


def swapped(values: dict[str, Any]) -> dict[str, Any]:
    from oprd_megatron.placing import build_models

    platform, checked = select_platform("cpu"), preflight(parse_config(values, "test"), 1, starts_run=False)
    model, _ = build_models(checked, platform)
    modules = weight_only_modules(model.chunks)
    before = [(module.weight.view(torch.uint8).clone(), module.exponents.clone()) for module in modules]
    residence = Residence(model, "t")
    residence.leave()
    gone = sum(module.weight.numel() + module.exponents.numel() for module in modules)
    residence.come_back()
    same = all(
        torch.equal(module.weight.view(torch.uint8), numbers) and torch.equal(module.exponents, some)
        for module, (numbers, some) in zip(modules, before, strict=True)
    )
    residence.leave()
    residence.luggage[-1].host[0] ^= 1
    with pytest.raises(TeacherWeightsError) as caught:
        residence.come_back()
    return {"gone": gone, "same": same, "says": str(caught.value)}


def test_it_takes_turns(values: dict[str, Any]) -> None:
    """Numbers and exponents leave the device and come back bit for bit; a changed exponent is noticed."""
    (found,) = run_ranks(1, swapped, with_weight_only(values))
    assert found["gone"] == 0 and found["same"] and "exponents of linear layer" in found["says"]


def with_weight_only(values: dict[str, Any]) -> dict[str, Any]:
    return changed(values, teacher={"precision": {"linear": "weight_only"}})


def test_a_width_that_cuts_blocks_is_refused(values: dict[str, Any]) -> None:
    """Before anything is loaded: 32 attention columns on two ranks are half a block each."""
    run = changed(with_weight_only(values), teacher={"parallel": {"tp": 2}}, student={"parallel": {"tp": 2}})
    with pytest.raises(LayoutError, match=r"teacher.precision: attention heads x head_dim / tp is 16"):
        preflight(parse_config(run, "test"), 2, starts_run=False)
