"""Files that strangers made: pipes, devices, links that lead away, sizes that are no sizes. Each is one line, at once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conversion_models import write_tiny_model

from checkpoints_conversion import HFReader, check_model, read_architecture
from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import quoted, reason, shown
from checkpoints_conversion.formats import model_config, open_source, weight_format
from oprd_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Ten seconds, then the test fails: an open pipe is waited for without end."""
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(10)
    yield
    signal.alarm(0)


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError("ten seconds")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A good model in one file."""
    write_tiny_model("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good model in several files."""
    write_tiny_model("llama", tmp_path / "model", shard_size="100KB")
    return tmp_path / "model"


def refused(hf_dir: Path) -> str:
    """The line with which a directory is refused; opening it alone is refused as well or works."""
    with pytest.raises(CheckpointError) as refusal:
        check_model(hf_dir)
    message = str(refusal.value)
    assert message.isprintable() and len(message) < 400
    return message


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "dangling link", "loop"])
def test_what_is_no_file_is_refused_at_once(kind: str, name: str, sharded: Path) -> None:
    """A pipe would be waited for, /dev/zero would fill memory."""
    path = sharded / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    if name == "model.safetensors":
        check_model(sharded)  # the index is used
        (sharded / INDEX).unlink()
    refused(sharded)


def test_a_shard_that_is_a_pipe(sharded: Path) -> None:
    """Of several files, one is a pipe."""
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: missing" in refused(sharded)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_json(path)


def test_a_link_out_of_the_directory_is_refused(single: Path) -> None:
    """Weights are read from the model directory, not from where a link in it leads."""
    outside = single.parent / "outside.safetensors"
    (single / "model.safetensors").rename(outside)
    (single / "model.safetensors").symlink_to(outside)
    assert "leads out of its directory" in refused(single)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname"])
def test_an_index_that_points_out_is_refused(name: str, sharded: Path) -> None:
    """The same through a name in the index."""
    first = min(sharded.glob("model-*.safetensors"))
    (sharded.parent / "outside.safetensors").write_bytes(first.read_bytes())
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**weight_map, "model.norm.weight": name})
    assert "leads out of its directory" in refused(sharded)


def test_a_snapshot_in_the_cache_is_read(sharded: Path) -> None:
    """huggingface_hub's cache: every file is a link to ../../blobs; so is the directory for whoever links to it."""
    home = sharded.parent / "models--tiny--llama"
    snapshot = home / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(home / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    check_model(snapshot)
    (sharded.parent / "link").symlink_to(snapshot)
    check_model(sharded.parent / "link")


@pytest.mark.parametrize("name", ["a\nb", "\x00", "x" * 300, "é" * 200, "", "\u202e", 3, None, ["x"]])
def test_an_index_with_names_that_are_none(name: object, sharded: Path) -> None:
    """File names with control characters, too long for a file system, or no strings."""
    edit(sharded / INDEX, weight_map={"model.norm.weight": name})
    assert "must be an object of file names" in refused(sharded)


def test_tensor_names_with_control_characters(sharded: Path) -> None:
    """A name out of a file is escaped and cut in a message."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**weight_map, "\x1b[2J\n" + "x" * 1000: weight_map["model.norm.weight"]})
    assert r"\x1b[2J\nxxx" in refused(sharded)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, "1" * 10**5, '{"a": ' * 2000, '{"model_type": 1, "model_type": 2}', "\x00", "\xff"]
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_python_stumbles_over(name: str, text: str, sharded: Path) -> None:
    """Depth, digits, a key twice, other encodings."""
    (sharded / name).write_bytes(text.encode("latin-1"))
    assert f"{sharded / name}: not valid JSON" in refused(sharded)


def test_a_huge_json_is_not_read(single: Path) -> None:
    """Its size is looked at first."""
    with open(single / "config.json", "ab") as file:
        file.truncate(2**40)
    assert "too many for such a file" in refused(single)


@pytest.mark.parametrize(
    "value", [10**400, 1e999, float("nan"), 2**31, -1, "7" * 200, [0] * 10_000, {"a": {}}, True, "\n"]
)
@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "rms_norm_eps", "rope_parameters", "model_type", "sliding_window"]
)
def test_config_values_that_are_none(key: str, value: object, single: Path) -> None:
    """No overflow, no table of 2**31 layers, and the message stays short."""
    if (key, value) == ("rms_norm_eps", 2**31):
        value = 1e31  # a size, but no epsilon
    edit(single / "config.json", **{key: value})
    assert "config.json" in refused(single)


def test_the_number_of_layers_has_a_limit(single: Path) -> None:
    """A table has a row for each; a million layers would be looked for one by one."""
    edit(single / "config.json", num_hidden_layers=10**6)
    assert "num_hidden_layers must be a positive whole number below 10000" in refused(single)


def test_a_table_of_experts_has_a_limit(tmp_path: Path) -> None:
    """A thousand layers of ten thousand experts would be tens of millions of rows."""
    config = dict(
        model_type="mixtral",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1000,
        num_attention_heads=1,
        vocab_size=8,
        max_position_embeddings=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        num_local_experts=9999,
        num_experts_per_tok=1,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="9999 experts in 1000 layers"):
        read_architecture(tmp_path)


def test_a_path_that_is_none() -> None:
    """Too long for the file system, or with a zero in it."""
    for path in ("x" * 5000, "a\x00b"):
        with pytest.raises(CheckpointError):
            check_model(path)
        with pytest.raises(CheckpointError):
            HFReader(path)
        with pytest.raises(CheckpointError):
            open_source(Path(path))


FOREIGN = {
    "adapter_model.safetensors": "LoRA adapter",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "model-00001-of-00002.safetensors": "without their index",
    "consolidated.safetensors": "Mistral's own layout",
    "weights.safetensors": "under other names",
    "pytorch_model-00001-of-00002.bin": "without their index",
    "consolidated.00.pth": "Meta's own layout",
    "__0_0.distcp": "a Megatron checkpoint",
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    "model.onnx": "ONNX",
    "weights.npz": "MLX",
    "last.ckpt": "training checkpoint",
    "model.pt": "training checkpoint",
    "model.pth": "training checkpoint",
    "weights.bin": "under another name",
    "model.safetensors.incomplete": "an unfinished download",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named(name: str, single: Path) -> None:
    """What is not read is told by what it is, with what to do, in one line."""
    (single / "model.safetensors").unlink()
    (single / name).write_text("x")
    with pytest.raises(CheckpointError) as refusal:
        open_source(single)
    message = str(refusal.value)
    assert FOREIGN[name] in message and ";" in message and message.isprintable()


@pytest.mark.parametrize("name", ["model.onnx", "x.pt", "model.safetensors", "config.json", "notes.txt"])
def test_a_single_file_is_a_gguf_file(name: str, tmp_path: Path) -> None:
    """Any other file is answered with what to give."""
    (tmp_path / name).write_text("x")
    with pytest.raises(CheckpointError, match=r"give the directory|not read"):
        weight_format(tmp_path / name)


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, {"x": 1}, "fp8"])
def test_quantised_weights_are_named(settings: object, single: Path) -> None:
    """Weights that are codes, not numbers."""
    edit(single / "config.json", quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"quantised weights .* are not read; dequantise"):
        open_source(single)


def test_safetensors_come_first(single: Path) -> None:
    """A directory with the same model in several formats is read from its safetensors."""
    for name in ("pytorch_model.bin", "model.gguf", "model.onnx"):
        (single / name).write_text("x")
    assert weight_format(single) == "safetensors" and isinstance(open_source(single), HFReader)
    assert model_config(single)["model_type"] == "llama"


def test_messages_are_one_short_line() -> None:
    """Whatever is put into them."""
    for value in (
        "a\nb\x1b",
        "x" * 10**6,
        [[[[[1]]]]],
        {"k": "v" * 10**6},
        10**4000,
        None,
        float("nan"),
        "\ud800",
        b"\x00" * 999,
    ):
        for text in (shown(value), quoted(value), reason(ValueError(value))):
            assert text.isprintable() and len(text) < 250
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    assert len(quoted(deep)) < 30, "deep enough to exhaust the stack of whoever prints all of it"
    assert reason(ValueError("")) == "ValueError" and reason(ValueError("one\ntwo")) == "one"
