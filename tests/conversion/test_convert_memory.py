"""Memory of whole conversions, measured from outside: it does not grow with the model."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file

from checkpoints_conversion import mappings_for, read_architecture

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4099, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
MIB = 2**20
SHARD_MIB = 16
"""Smaller than the embedding, and than one tensor of a layer."""


def write_model(folder: Path, layers: int) -> int:
    """One file, whatever its size; returns its MiB."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    table = mappings_for(read_architecture(folder)).values()
    save_file({name: torch.rand(s) for row in table for name, s in row.hf_shapes.items()}, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size // MIB


def peak_mib(command: str, source: Path, out: Path) -> float:
    """Largest sum of the proportional set sizes of a conversion's processes."""
    line = [sys.executable, "-m", "checkpoints_conversion", command, str(source), str(out), "--workers", "2"]
    process = subprocess.Popen([*line, f"--max-shard-size={SHARD_MIB}MiB"], stderr=subprocess.DEVNULL)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for each in [root, *root.children(recursive=True)]:
            try:
                total += each.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.01)
    assert process.returncode == 0
    return peak / MIB


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Eight times the layers, one file of half a gigabyte cut into 16 MiB: import and export stay below two files and a GiB,
    and need at most 64 MiB more than for the small model."""
    peaks = {}
    for layers in (1, 8):
        folder = tmp_path / str(layers)
        size = write_model(folder, layers)
        peaks[layers] = (
            peak_mib("import", folder, tmp_path / f"m{layers}"),
            peak_mib("export", tmp_path / f"m{layers}", tmp_path / f"b{layers}"),
        )
    assert size > 450
    for small, large in zip(*peaks.values(), strict=True):
        assert 20 < large < 2 * SHARD_MIB + 1024
        assert large - small < 64
