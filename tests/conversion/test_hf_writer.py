"""Writing a directory: what transformers loads back, and nothing at all when something goes wrong."""

import itertools
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conversion_models import write_tiny_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion import check_model
from checkpoints_conversion.live.writer import write_hf_directory
from oprd_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tied model with a tokenizer file and a chat template beside it."""
    directory = tmp_path / "source"
    write_tiny_model("qwen3", directory, tied=True)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("hello")
    (directory / "training_args.bin").write_text("not ours to copy")
    return directory


def tensors_of(source: Path) -> Iterator[tuple[str, Tensor]]:
    yield from load_file(source / "model.safetensors").items()


def failing_after_three(source: Path) -> Iterator[tuple[str, Tensor]]:
    """A stream that dies in the middle, like a killed run."""
    for position, item in enumerate(tensors_of(source)):
        if position == 3:
            raise RuntimeError("killed")
        yield item


def test_one_shard_is_bitwise_the_source(source: Path, tmp_path: Path) -> None:
    """One file, no index, same tensors, config copied byte for byte, companions copied and nothing else."""
    out = tmp_path / "deep" / "out"
    write_hf_directory(tensors_of(source), source, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} - {"training_args.bin"}
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    written, expected = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_many_shards_have_an_index_of_what_was_written(source: Path, tmp_path: Path) -> None:
    """Shards stay under the limit, the index has no ghost keys, transformers loads the same weights."""
    out = tmp_path / "out"
    write_hf_directory(tensors_of(source), source, out, max_shard_bytes=100_000)
    files = sorted(out.glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2 and not (out / "model.safetensors").exists()
    index = json.loads((out / INDEX).read_text())
    contents = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in contents.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in contents.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 100_000 or len(tensors) == 1 for size, tensors in zip(sizes, contents.values(), strict=True))
    assert all(size + following > 100_000 for size, following in itertools.pairwise(sizes))

    loaded, original = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, source))
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def test_a_stream_may_reuse_its_buffer(source: Path, tmp_path: Path) -> None:
    """A tensor is copied when it comes: what happens to its memory afterwards does not reach the file."""

    def one_buffer() -> Iterator[tuple[str, Tensor]]:
        buffer = torch.empty(509 * 48)
        for name, tensor in tensors_of(source):
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    write_hf_directory(one_buffer(), source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors_of(source))


def test_cast_is_told_in_config(source: Path, tmp_path: Path) -> None:
    """Written as bfloat16, config.json says bfloat16, in the key it had, and keeps everything else."""
    write_hf_directory(tensors_of(source), source, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert after == {**before, "dtype": "bfloat16"}


def test_a_full_target_is_refused_unless_overwritten(source: Path, tmp_path: Path) -> None:
    """A directory with files in it is kept; an empty one is used; overwrite replaces the whole of it."""
    out = tmp_path / "out"
    out.mkdir()
    write_hf_directory(tensors_of(source), source, out)
    (out / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_hf_directory(tensors_of(source), source, out)
    assert (out / "precious.txt").exists()
    write_hf_directory(tensors_of(source), source, out, overwrite=True)
    assert not (out / "precious.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_source_is_never_the_target(source: Path) -> None:
    """Neither the source nor a directory around it can be replaced, not even with overwrite."""
    for target in (source, source.parent):
        with pytest.raises(CheckpointError, match="choose another output directory"):
            write_hf_directory(tensors_of(source), source, target, overwrite=True)
    check_model(source)


def test_a_crash_leaves_nothing_and_keeps_the_old(source: Path, tmp_path: Path) -> None:
    """A stream that dies half-way leaves no directory, and an old export untouched; leftovers of a kill are cleared."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="killed"):
        write_hf_directory(failing_after_three(source), source, out)
    assert not out.exists() and not (tmp_path / "out.tmp").exists()
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "shard-0").write_text("left by a kill")
    write_hf_directory(tensors_of(source), source, out)
    with pytest.raises(RuntimeError, match="killed"):
        write_hf_directory(failing_after_three(source), source, out, overwrite=True)
    check_model(out)


def test_an_incomplete_model_is_not_published(source: Path, tmp_path: Path) -> None:
    """A stream that ends early is caught by the same check a download gets."""
    some = list(tensors_of(source))[:-1]
    with pytest.raises(CheckpointError, match="missing"):
        write_hf_directory(iter(some), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_target_is_one_line(source: Path, tmp_path: Path) -> None:
    """A path below a file is the user's to mend: one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the model"):
        write_hf_directory(tensors_of(source), source, tmp_path / "file" / "out")


def test_a_failing_disk_is_one_line(source: Path, tmp_path: Path) -> None:
    """A file that cannot grow, as on a full disk, becomes one line that names the target, and nothing stays behind."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the model .*File too large") as refusal:
            write_hf_directory(tensors_of(source), source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
