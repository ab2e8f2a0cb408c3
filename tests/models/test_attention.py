"""Packed and padded batches attend alike, and neither across sequences."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers import AutoModelForCausalLM

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models.build import without_head
from oprd_megatron.platform import select_platform
from tests.models.test_parity import TOLERANCE, VOCAB, build
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

LENGTHS = [5, 1, 9]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def packed_states(hf_dir: Path) -> torch.Tensor:
    """Final hidden states [P, D] of the sequences packed into one row."""
    (chunk,) = build(hf_dir, ParallelConfig()).chunks
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    ids = torch.cat(sequences()).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    with select_platform("cpu").scope(), torch.no_grad(), without_head(chunk):
        return chunk(input_ids=ids, position_ids=positions, attention_mask=None, packed_seq_params=packing)[:, 0]


def padded_states(hf_dir: Path) -> torch.Tensor:
    """The same states from a right-padded block, real tokens only."""
    (chunk,) = build(hf_dir, ParallelConfig()).chunks
    ids = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True, padding_value=11)
    positions = torch.arange(ids.size(1)).expand_as(ids)
    with select_platform("cpu").scope(), torch.no_grad(), without_head(chunk):
        states = chunk(input_ids=ids, position_ids=positions, attention_mask=None)
    return torch.cat([states[:length, row] for row, length in enumerate(LENGTHS)])


def test_packed_and_padded_equal_single_sequences(tmp_path: Path) -> None:
    """Each sequence of a packed or padded batch has the states it has alone in transformers."""
    tiny_hf_model("qwen3", tmp_path, num_layers=2, vocab_size=VOCAB, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        alone = torch.cat([model.model(ids.unsqueeze(0)).last_hidden_state[0] for ids in sequences()])
    for states in (packed_states, padded_states):
        (found,) = run_ranks(1, states, tmp_path)
        assert (found - alone).abs().max().item() <= TOLERANCE
