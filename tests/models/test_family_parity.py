"""Mistral, Phi-3 and Gemma 3 on mcore against transformers, past their windows and their longrope's original length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoints_conversion import Architecture, read_architecture
from checkpoints_conversion.architecture import LongRope
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.errors import LayoutError
from oprd_megatron.models import MicroBatch, Model, build_model
from oprd_megatron.models.rotary import refuse_cut_sequences
from oprd_megatron.models.spec import refuse_for_transformer_engine
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from tests.models.test_parity import LAYOUTS, VOCAB, assert_parity, ragged_texts
from tests.ranks import run_ranks
from tests.tiny_models import ORIGINAL_LENGTH, WINDOW, tiny_hf_model

LENGTHS = [ORIGINAL_LENGTH + 6, 3, 40, 1, ORIGINAL_LENGTH, ORIGINAL_LENGTH + 1]
"""One pack; windows are of 6 positions, and three sequences are no longer than the original length."""
TOLERANCE = 1e-5
"""Largest difference allowed in fp32, not relative: hidden states go up to 4 (Gemma's to 10), logits up to 3."""
HIDDEN = 32
LONG_ROPE = LongRope((1.0, 1.1), (2.0, 3.0), ORIGINAL_LENGTH, 1.5**0.5)
"""Of the tiny Phi-3; 512 positions are 8 times the original 64, and sqrt(1 + ln 8 / ln 64) = sqrt(1.5)."""


def model_dir(folder: Path, family: str, tied: bool) -> Path:
    tiny_hf_model(family, folder, tied=tied, num_layers=4, hidden_size=HIDDEN, vocab_size=VOCAB, std=0.1)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2sp", "pp2", "cp2", "pp2vpp2"])
@pytest.mark.parametrize(("family", "tied"), [("mistral", False), ("phi3", True), ("gemma3_text", True)])
def test_equals_transformers(tmp_path: Path, layout: str, family: str, tied: bool) -> None:
    """Logits and every hidden state of a pack are those of transformers, sequence by sequence, in every kind of layout."""
    hf_dir = model_dir(tmp_path, family, tied)
    assert_parity(hf_dir, LAYOUTS[layout], ragged_texts(LENGTHS, VOCAB), False, VOCAB, TOLERANCE)


@pytest.mark.parametrize("layout", ["single", "pp2"])
@pytest.mark.parametrize(("family", "tied"), [("mistral", True), ("phi3", False), ("gemma3_text", False)])
def test_the_other_head_equals_transformers(tmp_path: Path, layout: str, family: str, tied: bool) -> None:
    """The same where the head is tied (Gemma's unscaled) or not, the other way than the family usually is."""
    hf_dir = model_dir(tmp_path, family, tied)
    assert_parity(hf_dir, LAYOUTS[layout], ragged_texts(LENGTHS[:3], VOCAB), False, VOCAB, TOLERANCE)


def build(
    hf_dir: Path,
    changes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    recompute: RecomputeConfig | None = None,
) -> Model:
    """On a single rank, with these fields of the architecture changed."""
    platform, architecture = select_platform("cpu"), replace(read_architecture(hf_dir), **changes)
    with platform.scope():
        grid = build_grid(GridLayout(1, 1, 1, False, (architecture.num_layers,)))
        init_mcore_globals(0, 0)
    return build_model(architecture, grid, platform, dtype=dtype, hf_dir=hf_dir, frozen=False, recompute=recompute)


def logits(model: Model, lengths: list[int]) -> torch.Tensor:
    """[P, Vp] of one pack."""
    texts = ragged_texts(lengths, VOCAB)
    ids = torch.tensor([token for text in texts for token in text])
    with select_platform("cpu").scope():
        packing = MicroBatch(0, ids, torch.tensor([0, *lengths]).cumsum(0).tolist()).packing(ids.device)
        return model.chunks[0](ids[None], ids[None], None, packed_seq_params=packing)[0]


def logits_with(hf_dir: Path, variants: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [logits(build(hf_dir, changes), LENGTHS[:3]).detach() for changes in variants]


FIELDS: dict[str, list[dict[str, Any]]] = {
    "mistral": [{"attention_windows": ()}, {"attention_windows": (WINDOW + 1,) * 4}, {"attention_windows": (WINDOW - 1,) * 4}],
    "phi3": [
        {"rope_scaling": None},
        {"rope_scaling": replace(LONG_ROPE, attention_factor=1.0)},
        {"rope_scaling": replace(LONG_ROPE, short_factors=LONG_ROPE.long_factors)},
        {"rope_scaling": replace(LONG_ROPE, long_factors=LONG_ROPE.short_factors)},
        {"rope_scaling": replace(LONG_ROPE, original_max_position_embeddings=LENGTHS[0])},
    ],
    "gemma3_text": [
        {"attention_windows": ()},
        {"local_rotary_base": 1000000.0},
        {"rope_scaling": None},
        {"attention_scale": None},
        {"activation": "silu"},
        {"embedding_scale": 1.0},
        {"zero_centred_norm": False},
        {"sandwich_norm": False},
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FIELDS)
def test_every_field_shows(tmp_path: Path, family: str) -> None:
    """Each of the new fields moves the logits of these models by 100 times the tolerance and more: parity could not miss it."""
    if family == "phi3":
        assert architecture_of(tmp_path / "read", "phi3").rope_scaling == LONG_ROPE
    (found,) = run_ranks(1, logits_with, model_dir(tmp_path, family, tied=True), [{}, *FIELDS[family]])
    for changes, changed in zip(FIELDS[family], found[1:], strict=True):
        assert (changed - found[0]).abs().max() > 100 * TOLERANCE, changes


def recomputed_gradients(hf_dir: Path) -> list[list[torch.Tensor]]:
    """Gradients of all parameters, kept, recomputed layer by layer, and with attention recomputed."""
    found = []
    for recompute in (None, RecomputeConfig(granularity="full"), RecomputeConfig(granularity="selective")):
        model = build(hf_dir, {}, recompute=recompute)
        with select_platform("cpu").scope():
            logits(model, LENGTHS[:3]).square().sum().backward()
        found.append([parameter.grad for parameter in model.chunks[0].parameters() if parameter.grad is not None])
    return found


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3_text"])
def test_recomputation_changes_nothing(tmp_path: Path, family: str) -> None:
    """A layer run again in backward takes the same angles, window and norms: every gradient is bitwise the same."""
    ((kept, *recomputed),) = run_ranks(1, recomputed_gradients, model_dir(tmp_path, family, tied=True))
    for gradients in recomputed:
        assert len(gradients) == len(kept)
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))


def embedded_and_normed(hf_dir: Path, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In bf16: embedded tokens [P, D], and the final norm of `hidden` [P, D]."""
    chunk = build(hf_dir, {}, dtype=torch.bfloat16).chunks[0]
    with select_platform("cpu").scope(), torch.no_grad():
        return chunk.embedding(ids[None], ids[None])[:, 0], chunk.decoder.final_layernorm(hidden)


def test_gemma_rounds_where_transformers_does(tmp_path: Path) -> None:
    """In bf16 the scaled embedding (its factor rounded first) and the norm (rounded last) are transformers' bit for bit."""
    hf_dir = model_dir(tmp_path, "gemma3_text", tied=True)
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.bfloat16).model
    ids, hidden = torch.arange(50), torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    ((embedded, normed),) = run_ranks(1, embedded_and_normed, hf_dir, ids, hidden)
    with torch.no_grad():
        assert torch.equal(embedded, model.embed_tokens(ids)) and torch.equal(normed, model.norm(hidden))
    assert torch.tensor(HIDDEN**0.5).bfloat16().double() != HIDDEN**0.5


def sharded_keys(hf_dir: Path) -> set[str]:
    model = build(hf_dir, {})
    with select_platform("cpu").scope():
        state = model.chunks[0].sharded_state_dict(metadata={"dp_cp_group": model.grid.groups.dp_cp})
    return {value.key for name, value in state.items() if "_extra_state" not in name}


def test_checkpoints_have_the_fused_names(tmp_path: Path) -> None:
    """In a sharded checkpoint norms have the names of Transformer Engine's fused layers, and Gemma's norms of outputs those of
    Megatron-Bridge: either spec reads the other's checkpoints."""
    (keys,) = run_ranks(1, sharded_keys, model_dir(tmp_path, "gemma3_text", tied=True))
    norms = (
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_proj.post_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc2.post_layernorm.weight",
    )
    assert {f"decoder.layers.{norm}" for norm in norms} <= keys
    assert not any("input_layernorm" in key or "pre_mlp_layernorm" in key for key in keys)


def architecture_of(folder: Path, family: str) -> Architecture:
    return read_architecture(model_dir(folder, family, tied=True))


@pytest.mark.parametrize(
    ("family", "cp", "named"),
    [
        ("gemma3_text", 1, "norms on the outputs"),
        ("phi3", 1, "longrope"),
        ("mistral", 2, "sliding windows with context parallelism"),
        ("mistral", 1, None),
        ("llama", 2, None),
    ],
)
def test_transformer_engine_is_not_asked_for_what_it_lacks(
    tmp_path: Path, family: str, cp: int, named: str | None
) -> None:
    """What mcore's TE layers cannot do is refused in one line that names it, before anything is built."""
    architecture = architecture_of(tmp_path, family)
    if named is None:
        refuse_for_transformer_engine(architecture, cp)
        return
    with pytest.raises(LayoutError, match=named) as refusal:
        refuse_for_transformer_engine(architecture, cp)
    assert "\n" not in str(refusal.value)


def test_cp_may_not_push_a_sequence_over_the_original_length(tmp_path: Path) -> None:
    """Filling sequences up to multiples of 2 cp must not change which longrope factors they get."""
    phi3 = architecture_of(tmp_path / "phi3", "phi3")
    for cp in (1, 2, 4):
        refuse_cut_sequences(phi3, cp)
    with pytest.raises(LayoutError, match="cp 3"):
        refuse_cut_sequences(phi3, 3)
    refuse_cut_sequences(architecture_of(tmp_path / "gemma", "gemma3_text"), 3)
