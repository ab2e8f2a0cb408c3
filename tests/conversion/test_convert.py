"""Whole conversions: there and back bitwise, loadable by plain mcore at any layout, within bounds, and refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_models import FAMILIES, write_tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_conversion import read_architecture
from checkpoints_conversion.convert.hf_to_megatron import import_hf
from checkpoints_conversion.convert.jobs import staging_of
from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.convert.progress import Progress
from oprd_megatron.errors import CheckpointError, LayoutError
from tests.tiny_models import tiny_tokenizer

ONE = Options(workers=1)


def convert(source: Path, out: Path, options: Options = ONE) -> Path:
    import_hf(source, out, options, Progress())
    return out


def back(source: Path, out: Path, options: Options = ONE) -> Path:
    export_megatron(source, out, options, Progress())
    return out


def tensors_of(hf_dir: Path) -> dict[str, Tensor]:
    return {name: tensor for file in hf_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_models(found: Path, expected: Path) -> None:
    """Every name, dtype and bit; every other file byte for byte; the index is that of the files."""
    one, other = tensors_of(found), tensors_of(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    for path in expected.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            assert (found / path.name).read_bytes() == path.read_bytes(), path.name
    index = found / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        for file in found.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert {name for name, place in weight_map.items() if place == file.name} == set(opened.keys())
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in one.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise(family: str, tied: bool, tmp_path: Path) -> None:
    """bf16 in many files, then fp32 in one: every tensor, name, dtype, config and tokenizer file comes back as it was."""
    for dtype, shard_size, shard_bytes in ((torch.bfloat16, "20KB", 15_000), (torch.float32, "5GB", 5 * 10**9)):
        source = tmp_path / str(dtype)
        write_tiny_model(family, source, tied, dtype, shard_size)
        tiny_tokenizer(source)
        (source / "generation_config.json").write_text('{"temperature": 0.3}')
        options = Options(workers=1, max_shard_bytes=shard_bytes)
        megatron = convert(source, tmp_path / f"{dtype}-megatron", options)
        returned = back(megatron, tmp_path / f"{dtype}-back", options)
        assert_equal_models(returned, source)
        assert (len(list(returned.glob("*.safetensors"))) > 1) == (dtype == torch.bfloat16)


def test_a_fixed_layout_holds_the_same(tmp_path: Path) -> None:
    """Cut for tp 3 x pp 3, with another padding of the vocabulary, the round trip is the same; files are named by rank."""
    write_tiny_model("qwen2", tmp_path / "hf", intermediate_size=96)
    cut = Options(workers=1, tp=3, pp=3, vocab_multiple=50)
    megatron = convert(tmp_path / "hf", tmp_path / "megatron", cut)
    ranks = {path.name.split("_")[2] for path in (megatron / "release").glob("__[0-9]*_[0-9]*.distcp")}
    assert ranks == {str(rank) for rank in range(9)}
    assert_equal_models(back(megatron, tmp_path / "back"), tmp_path / "hf")


def test_settings_that_no_package_can_say(tmp_path: Path) -> None:
    """Gemma with its full-attention layers at irregular places comes back, though run_config.yaml can only say a regular place;
    with another epsilon in the companion config it is refused by name."""
    write_tiny_model(
        "gemma3_text", tmp_path / "hf", num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )  # fmt: skip
    megatron = convert(tmp_path / "hf", tmp_path / "m")
    assert_equal_models(back(megatron, tmp_path / "b"), tmp_path / "hf")
    config = megatron / "hf" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(CheckpointError, match="norm"):
        back(megatron, tmp_path / "b2")


def test_several_workers_write_the_same_bytes(tmp_path: Path) -> None:
    """One process or three: equal files, manifest included."""
    write_tiny_model("llama", tmp_path / "hf", dtype=torch.bfloat16)
    folders = []
    for workers in (1, 3):
        options = Options(workers=workers, max_shard_bytes=20_000)
        convert(tmp_path / "hf", tmp_path / f"m{workers}", options)
        folders.append(back(tmp_path / f"m{workers}", tmp_path / f"b{workers}", options))
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    first.pop("conversion.json"), second.pop("conversion.json")  # they name their sources
    assert first == second


@pytest.mark.parametrize(
    ("given", "wanted"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)]
)
def test_rounding_is_torch_s(given: str, wanted: torch.dtype, tmp_path: Path) -> None:
    """--dtype gives what torch's cast gives, bit for bit, whichever side rounds; config.json names the new dtype."""
    source = tmp_path / "hf"
    write_tiny_model("llama", source)
    tensors = tensors_of(source)
    tensors["model.norm.weight"][:4] = torch.tensor([1e30, -1e-30, 65519.0, 1.00390625])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rounded = Options(workers=1, dtype=given)
    convert(source, tmp_path / "m1", rounded)
    convert(source, tmp_path / "m2")
    back(tmp_path / "m1", tmp_path / "b1")
    back(tmp_path / "m2", tmp_path / "b2", rounded)
    for folder in ("b1", "b2"):
        for name, tensor in tensors_of(tmp_path / folder).items():
            assert tensor.dtype == wanted and torch.equal(tensor, tensors[name].to(wanted)), name
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == str(wanted).removeprefix("torch.")


def test_mixed_dtypes_are_kept_or_refused(tmp_path: Path) -> None:
    """A float32 norm in a bf16 model stays float32; q and k of different dtypes make one parameter and are refused."""
    source = tmp_path / "hf"
    write_tiny_model("llama", source, dtype=torch.bfloat16)
    tensors = tensors_of(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert_equal_models(back(convert(source, tmp_path / "m"), tmp_path / "b"), source)
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="have dtypes BF16, F32; choose one with --dtype"):
        convert(source, tmp_path / "m2")


def test_tensors_that_no_model_uses(tmp_path: Path) -> None:
    """Refused by name; with --no-strict left out, with a note. Old rotary buffers are always left out."""
    source = tmp_path / "hf"
    write_tiny_model("llama", source)
    tensors = tensors_of(source)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    summary = import_hf(source, tmp_path / "m1", ONE, Progress())
    assert any("inv_freq" in note for note in summary.notes)
    save_file({**tensors, "model.extra": torch.ones(4)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.extra"):
        convert(source, tmp_path / "m2")
    convert(source, tmp_path / "m2", Options(workers=1, strict=False))


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    """An output that is not empty, a file, the source itself, something that is no model: refused, untouched."""
    source, out = tmp_path / "hf", tmp_path / "out"
    write_tiny_model("llama", source)
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for options, said in ((ONE, "not empty"), (Options(workers=1, overwrite=True), "something other than a model")):
        with pytest.raises(CheckpointError, match=said):
            convert(source, out, options)
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match=r"the source .* is in it"):
        convert(source, source, Options(workers=1, overwrite=True))
    with pytest.raises(CheckpointError, match=r"the source .* is in it"):
        convert(source, tmp_path, Options(workers=1, overwrite=True))
    with pytest.raises(CheckpointError, match="its directory does not exist"):
        convert(source, tmp_path / "no" / "where")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a directory"):
        convert(source, tmp_path / "file")


def test_overwrite_and_resume(tmp_path: Path) -> None:
    """--overwrite replaces an earlier result; --resume of a complete one changes nothing; an unfinished one is not begun again
    unasked."""
    source, out = tmp_path / "hf", tmp_path / "out"
    write_tiny_model("llama", source)
    convert(source, out)
    before = (out / "conversion.json").stat().st_ino
    assert import_hf(source, out, Options(workers=1, resume=True), Progress()).notes == ("complete already",)
    assert (out / "conversion.json").stat().st_ino == before
    write_tiny_model("llama", source, seed=1)
    convert(source, out, Options(workers=1, overwrite=True))
    assert_equal_models(back(out, tmp_path / "back"), source)
    staging_of(tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="continue it with --resume, or begin again with --overwrite"):
        convert(source, tmp_path / "other")


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone writes the input during the conversion: one line, and no output."""
    from checkpoints_conversion.convert import hf_to_megatron

    source, out = tmp_path / "hf", tmp_path / "out"
    write_tiny_model("llama", source)
    real = hf_to_megatron.run_job

    def disturbed(*args: object, **kwargs: object) -> object:
        records = real(*args, **kwargs)
        write_tiny_model("llama", source, seed=5)
        return records

    monkeypatch.setattr(hf_to_megatron, "run_job", disturbed)
    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        convert(source, out)
    assert not out.exists()


def test_layouts_that_do_not_fit(tmp_path: Path) -> None:
    """--tp and --pp that do not divide the model say by what."""
    write_tiny_model("llama", tmp_path / "hf")
    with pytest.raises(LayoutError, match="--tp 2 does not divide 3 key/value heads"):
        convert(tmp_path / "hf", tmp_path / "m", Options(workers=1, tp=2))
    with pytest.raises(LayoutError, match="--pp 2 does not divide 3 layers"):
        convert(tmp_path / "hf", tmp_path / "m", Options(workers=1, pp=2))


@pytest.mark.parametrize("harm", ["truncate", "flip", "missing file", "no metadata", "other model"])
def test_a_damaged_checkpoint_is_refused(harm: str, tmp_path: Path) -> None:
    """One line that names the place; no output."""
    write_tiny_model("llama", tmp_path / "hf")
    release = convert(tmp_path / "hf", tmp_path / "m") / "release"
    data = release / "__0_0.distcp"
    like = None
    if harm == "truncate":
        data.write_bytes(data.read_bytes()[:-100])
    elif harm == "flip":
        raw = bytearray(data.read_bytes())
        raw[-22] ^= 8  # the end of the last container's directory
        data.write_bytes(raw)
    elif harm == "missing file":
        data.unlink()
    elif harm == "no metadata":
        (release / "metadata.json").unlink()
    else:
        like = tmp_path / "like"
        write_tiny_model("qwen2", like)
    with pytest.raises(CheckpointError) as refused:
        export_megatron(tmp_path / "m", tmp_path / "b", ONE, Progress(), like)
    assert "\n" not in str(refused.value) and not (tmp_path / "b").exists()


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    """`python -m checkpoints_conversion`: summary on success; one line and exit code 2 for a mistake; workers in processes."""
    write_tiny_model("qwen3", tmp_path / "hf", dtype=torch.bfloat16)
    tool = [sys.executable, "-m", "checkpoints_conversion"]
    flags = ["--workers", "2", "--max-shard-size", "20KB"]
    run = subprocess.run([*tool, "import", "hf", "m", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in ("tensors", "GiB", "peak memory"))
    again = subprocess.run([*tool, "import", "hf", "m"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr
    run = subprocess.run([*tool, "export", "m", "back", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_equal_models(tmp_path / "back", tmp_path / "hf")
    for size in ("5 apples", "-1", "GB"):
        run = subprocess.run(
            [*tool, "export", "m", "x", f"--max-shard-size={size}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 2 and "--max-shard-size" in run.stderr and "Traceback" not in run.stderr
    shutil.rmtree(tmp_path / "m" / "hf")
    run = subprocess.run([*tool, "export", "m", "y"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and "--like" in run.stderr
    assert read_architecture(tmp_path / "back") == read_architecture(tmp_path / "hf")
