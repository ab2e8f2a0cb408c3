"""The up-front checks: every way a download can be broken, refused in one line before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion_models import FAMILIES, write_tiny_model
from safetensors.torch import load_file, save_file

from checkpoints_conversion import HFReader, Sharding, check_model, read_architecture
from checkpoints_conversion.live.weights import load_hf_weights
from oprd_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def refused(hf_dir: Path) -> str:
    """The one-line message `check_model` refuses the directory with; loading refuses it too."""
    with pytest.raises(CheckpointError) as refusal:
        check_model(hf_dir)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def edit_weights(hf_dir: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite model.safetensors after `edit` changed its dict of tensors."""
    tensors = load_file(hf_dir / "model.safetensors")
    edit(tensors)
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A good untied model in one file."""
    write_tiny_model("llama", tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good untied model in several files."""
    write_tiny_model("llama", tmp_path, shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["100KB", "5GB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accepts_what_transformers_writes(family: str, shard_size: str, tied: bool, tmp_path: Path) -> None:
    """A whole directory passes, in one file or several."""
    write_tiny_model(family, tmp_path, tied, shard_size=shard_size)
    assert check_model(tmp_path) == read_architecture(tmp_path)


def test_reads_slices_along_both_dimensions(single: Path) -> None:
    """`read` returns exactly the asked range, an empty one included (a rank that holds only padding)."""
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = load_file(single / "model.safetensors")[name]
    with HFReader(single) as reader:
        assert torch.equal(reader.read(name, 5, 6), whole[5:11])
        assert torch.equal(reader.read(name, 0, 48, (5, 11)), whole[:, 5:11])
        assert reader.read(name, 48, 0).shape == (0, 48)
        assert reader.read(name, 0, 48, (7, 7)).shape == (48, 0)


def test_refuses_missing_directory_and_config(single: Path) -> None:
    """A path that is no model directory says so."""
    assert "no such model directory" in refused(single / "nowhere")
    (single / "config.json").unlink()
    assert "config.json: no such file" in refused(single)


def test_refuses_a_directory_without_safetensors(single: Path) -> None:
    """No weights at all is an unfinished download; pytorch_model.bin comes with what to do."""
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(single)
    (single / "pytorch_model.bin").touch()
    assert "save_pretrained" in refused(single)


def test_refuses_a_truncated_file(single: Path) -> None:
    """A file shorter than its header says is caught by size, without reading it."""
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: truncated or damaged" in refused(single)
    path.write_bytes(b"")
    assert "truncated or damaged" in refused(single)


@pytest.mark.parametrize("position", [0, 7, 8, 9, 40])
def test_refuses_a_flipped_bit_in_the_header(position: int, single: Path) -> None:
    """A damaged header is a one-line refusal: never a crash, never a silent success."""
    path = single / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x40
    path.write_bytes(bytes(content))
    assert str(single) in refused(single)


def test_refuses_a_missing_shard(sharded: Path) -> None:
    """A half-downloaded model: the first missing file and how many are missing."""
    first, second, *_ = files = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    second.unlink()
    assert f"{first}: missing (2 of {len(files)} shards are)" in refused(sharded)


def test_refuses_an_index_that_lies(sharded: Path) -> None:
    """A tensor the index places in a file that does not hold it is named."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "model.ghost.weight" in refused(sharded)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_refuses_a_broken_index(content: str, sharded: Path) -> None:
    """An index that is no index names the file."""
    (sharded / INDEX).write_text(content)
    assert INDEX in refused(sharded)


def test_refuses_one_tensor_in_two_files(sharded: Path) -> None:
    """A stale shard that repeats a tensor is not silently preferred or ignored."""
    files = sorted(sharded.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    save_file({**second, **dict([next(iter(first.items()))])}, files[1], metadata={"format": "pt"})
    assert next(iter(first)) in refused(sharded)


def test_refuses_an_unfinished_download(single: Path) -> None:
    """A leftover of an interrupted download is named even if the weights look whole."""
    (single / "model.safetensors.incomplete").touch()
    assert "model.safetensors.incomplete: an unfinished download" in refused(single)


def test_refuses_a_missing_tensor(single: Path) -> None:
    """A tensor that config.json implies and no file holds is named."""
    edit_weights(single, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    assert "model.layers.2.mlp.up_proj.weight" in refused(single)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"])
def test_refuses_unexpected_tensors(name: str, single: Path) -> None:
    """A bias or a layer that config.json does not speak of would be dropped silently: refused by name."""
    edit_weights(single, lambda tensors: tensors.update({name: torch.zeros(48)}))
    assert name in refused(single)


def test_refuses_a_wrong_shape(single: Path) -> None:
    """The shape found and the shape config.json implies."""
    edit_weights(single, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    assert "model.norm.weight is [47], but config.json implies [48]" in refused(single)


def test_refuses_quantized_weights(single: Path) -> None:
    """Integer weights are not cast to numbers that mean nothing."""
    edit_weights(single, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    assert "model.norm.weight is I8" in refused(single)


def test_ignores_what_no_model_reads(tmp_path: Path) -> None:
    """Old rotary buffers and the second copy of a tied head are skipped; an untied head is not."""
    write_tiny_model("llama", tmp_path, tied=True)
    edit_weights(
        tmp_path,
        lambda tensors: tensors.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(509, 48)}
        ),
    )
    check_model(tmp_path)


def test_loading_checks_too(single: Path) -> None:
    """`load_hf_weights` refuses a directory that is not the architecture it is given, before it touches the model."""
    arch = check_model(single)
    edit_weights(single, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(47)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_hf_weights([], single, Sharding.smallest(arch), arch)
