"""Damaged files of every kind: read or refused in one line; no traceback, no hang, no crash, no gigabytes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch
from fuzzing import TARGETS
from gguf_files import tiny_gguf_model, write_gguf
from safetensors.torch import load_file
from transformers import LlamaTokenizer

from tests.tiny_models import tiny_hf_model

SEED = 20261122
MAX_GROWTH = 256 * 2**20
"""Of memory, over all cases; the largest file has 0.4 MB."""
SECONDS = 120


def write_models(home: Path) -> None:
    """A good model for each target."""
    for name in ("safetensors", "config", "tokenizer"):
        tiny_hf_model("llama", home / name, num_layers=2)
    for name in ("shards", "index"):
        model = tiny_hf_model("qwen3", home / name, num_layers=2)
        (home / name / "model.safetensors").unlink()
        model.save_pretrained(home / name, max_shard_size="60KB")
    for name in ("bin", "legacy"):
        tiny_hf_model("llama", home / name, num_layers=2)
        weights = home / name / "model.safetensors"
        torch.save(load_file(weights), home / name / "pytorch_model.bin", _use_new_zipfile_serialization=name == "bin")
        weights.unlink()
    write_gguf(home / "gguf" / "model.gguf", "llama", tiny_gguf_model("llama"))
    tiny_hf_model("llama", home / "pieces", num_layers=1, vocab_size=320)
    for path in (home / "pieces").glob("tokenizer*"):
        path.unlink()
    (home / "pieces" / "tokenizer.model").write_bytes(_pieces())
    LlamaTokenizer.from_pretrained(home / "pieces").save_pretrained(home / "pieces")


def _pieces() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_writer=out,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """A thousand damaged files, from a seed, in a process with a limit on memory and time: see `fuzzing`."""
    write_models(tmp_path)
    script = Path(__file__).with_name("fuzzing.py")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(SEED)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, f"seed {SEED}: ended with {process.returncode}: {process.stderr[-2000:]}"
    report = json.loads(process.stdout.splitlines()[-1])
    print(f"seed {SEED}: {report}")
    assert not report["wrong"], f"seed {SEED}: {len(report['wrong'])} cases: " + "\n".join(report["wrong"][:10])
    assert report["grown"] < MAX_GROWTH
    assert sum(report["cases"].values()) >= 1000 and report["cases"].keys() == {target.name for target in TARGETS}
    for name, refused in report["refused"].items():
        assert refused > report["cases"][name] // 10, f"{name}: only {refused} refused; the damage does not reach it"
