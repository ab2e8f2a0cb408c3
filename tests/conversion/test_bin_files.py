"""PyTorch's .bin files: the same tensors as transformers loads, by rows, and nothing in them is ever run."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion_models import tiny_config, write_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion.formats import model_architecture, open_source, weight_format
from checkpoints_conversion.formats.bin import INDEX_FILE, SINGLE_FILE, BinSource
from checkpoints_conversion.reader import check_tensors, read_rows
from oprd_megatron.errors import CheckpointError


def write_bin(hf_dir: Path, tied: bool = False, legacy: bool = False, parts: int = 1) -> dict[str, torch.Tensor]:
    """A tiny Llama of which only .bin files are there; returns its tensors."""
    write_tiny_model("llama", hf_dir, tied)
    tensors = load_file(hf_dir / "model.safetensors")
    (hf_dir / "model.safetensors").unlink()
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if parts == 1:
        torch.save(tensors, hf_dir / SINGLE_FILE, _use_new_zipfile_serialization=not legacy)
        return tensors
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-{i % parts + 1:05d}-of-{parts:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save(
            {name: tensors[name] for name in names if weight_map[name] == file},
            hf_dir / file,
            _use_new_zipfile_serialization=not legacy,
        )
    (hf_dir / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def refused(hf_dir: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(CheckpointError) as refusal:
        open_source(hf_dir)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    return str(refusal.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_reads_what_transformers_reads(parts: int, legacy: bool, tied: bool, tmp_path: Path) -> None:
    """Any version, one file or several, a shared tensor or not: every tensor, and any rectangle of it, bit for bit."""
    tensors = write_bin(tmp_path, tied, legacy, parts)
    assert weight_format(tmp_path) == "bin"
    source = open_source(tmp_path)
    check_tensors(source, model_architecture(tmp_path), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert source.names == tensors.keys() and len(source.files) == parts
    for name in source.names:
        assert torch.equal(read_rows(source, name, 0, source.shape(name)[0]), loaded[name])
        assert source.file_of(name) in source.files
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(read_rows(source, name, 5, 6, (7, 30)), tensors[name][5:11, 7:30])
    assert torch.equal(read_rows(source, "model.norm.weight", 3, 9), tensors["model.norm.weight"][3:12])
    assert read_rows(source, name, 5, 0).shape == (0, 48)
    source.close()


@pytest.mark.parametrize("legacy", [True, False])
def test_reads_any_strides_and_dtypes(legacy: bool, tmp_path: Path) -> None:
    """Transposed, sliced, expanded and scalar tensors, parameters, half precision: as torch sees them."""
    base = torch.arange(60.0).view(6, 10)
    tensors = {
        "plain": base,
        "transposed": base.t(),
        "sliced": base[1:5, 2:9:3],
        "expanded": torch.ones(1, 4).expand(5, 4),
        "half": base.half(),
        "bfloat": base.bfloat16().t(),
        "parameter": torch.nn.Parameter(base * 2),
        "vector": base[:, 3],
        "empty": torch.empty(0, 4),
    }
    write_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / SINGLE_FILE, _use_new_zipfile_serialization=not legacy)
    source = BinSource(tmp_path)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        for row, rows in ((0, tensor.shape[0]), (1, tensor.shape[0] - 2), (tensor.shape[0], 0)):
            assert torch.equal(read_rows(source, name, row, max(rows, 0)), tensor[row : row + max(rows, 0)])
        if tensor.dim() == 2 and tensor.shape[0]:
            assert torch.equal(read_rows(source, name, 1, 2, (1, 3)), tensor[1:3, 1:3])
    source.close()


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["value", "whole"])
def test_nothing_in_a_file_is_run(place: str, legacy: bool, tmp_path: Path) -> None:
    """A pickle that calls something is refused in one line, and what it calls is not called."""
    sentinel, hf_dir = tmp_path / "sentinel", tmp_path / "model"
    tensors = write_bin(hf_dir)
    evil: object = Malicious(sentinel) if place == "whole" else {**tensors, "extra": Malicious(sentinel)}
    torch.save(evil, hf_dir / SINGLE_FILE, _use_new_zipfile_serialization=not legacy)
    refused(hf_dir)
    assert not sentinel.exists()
    with open(hf_dir / SINGLE_FILE, "rb") as file:
        torch.load(file, weights_only=False)
    assert sentinel.exists(), "the file is harmless; the test proves nothing"


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(100)])
def test_refuses_what_is_no_weight_file(content: bytes, tmp_path: Path) -> None:
    """Other bytes under the name are refused by name."""
    write_bin(tmp_path)
    (tmp_path / SINGLE_FILE).write_bytes(content)
    assert SINGLE_FILE in refused(tmp_path)


def test_refuses_other_objects(tmp_path: Path) -> None:
    """A checkpoint with a model inside, or a quantised or sparse tensor, is not read as weights."""
    tensors = write_bin(tmp_path)
    for wrong in (
        {"state_dict": tensors},
        [tensors],
        {**tensors, "x": 3},
        {**tensors, "x": torch.ones(3, 3).to_sparse()},
    ):
        for new in (True, False):
            torch.save(wrong, tmp_path / SINGLE_FILE, _use_new_zipfile_serialization=new)
            assert "plain tensors" in refused(tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_refuses_a_truncated_file(keep: float, legacy: bool, tmp_path: Path) -> None:
    """A file that ends early is caught when it is opened."""
    write_bin(tmp_path, legacy=legacy)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert SINGLE_FILE in refused(tmp_path)


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    """A zip bomb stays compressed: torch never compresses, so a record that is compressed is damage."""
    write_bin(tmp_path)
    path = tmp_path / SINGLE_FILE
    with zipfile.ZipFile(path) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)
    assert "compressed" in refused(tmp_path)


def test_a_claim_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """A tensor that says it is larger than its storage reads nothing of its neighbours."""
    write_bin(tmp_path)
    small = torch.zeros(4)
    torch.save({"x": small}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    position = content.index(b"K\x04\x85")  # the sizes (4,)
    (tmp_path / SINGLE_FILE).write_bytes(content[:position] + b"K\x40\x85" + content[position + 3 :])
    assert "larger than its data" in refused(tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Reading a few rows of a large tensor takes a few rows of memory, and no map of the file."""
    tiny_config("llama").save_pretrained(tmp_path)
    torch.save({"x": torch.zeros(2**18, 64)}, tmp_path / SINGLE_FILE)
    source = BinSource(tmp_path)
    before = _resident()
    for row in range(0, 2**18, 2**12):
        read_rows(source, "x", row, 16)
    assert _resident() - before < 16 * 2**20
    source.close()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
