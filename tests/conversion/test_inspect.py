"""What a directory is, whether it is whole, and which file of it is damaged."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conversion_models import write_tiny_model
from gguf_files import tiny_gguf_model, write_gguf
from safetensors.torch import load_file, save_file

from checkpoints_conversion.convert.hf_to_megatron import import_hf
from checkpoints_conversion.convert.jobs import JOURNAL
from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.describe import check_checksums, describe, description_text
from checkpoints_conversion.torch_dist import write_common
from oprd_megatron.errors import CheckpointError
from tests.tiny_models import tiny_tokenizer

OPTIONS = Options(workers=1, max_shard_bytes=60_000)


def quiet() -> Progress:
    return Progress(io.StringIO())


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tiny untied Qwen3 with a tokenizer."""
    write_tiny_model("qwen3", tmp_path / "hf")
    tiny_tokenizer(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    """The same, converted to several files."""
    import_hf(hf, tmp_path / "megatron", OPTIONS, quiet())
    return tmp_path / "megatron"


def test_hugging_face(hf: Path) -> None:
    """Family, sizes, bytes, tokenizer, as the files say."""
    model = write_tiny_model("qwen3", hf)
    found = describe(hf)
    assert found.problem is None and found.architecture is not None and found.architecture.family == "qwen3"
    assert found.parameters == found.active_parameters == sum(p.numel() for p in model.parameters())
    assert (found.nbytes, found.dtypes) == (4 * found.parameters, {"F32": 4 * found.parameters})
    assert found.files == [("model.safetensors", (hf / "model.safetensors").stat().st_size)]
    assert len(found.tensors) == len(model.state_dict()) and found.tensors[0].shape == (509, 48)
    text = description_text(found)
    for part in (
        "safetensors",
        "qwen3: 3 layers, width 48, 6 heads in 3 groups of width 16",
        "norms of q and k",
        "own output",
    ):
        assert part in text
    assert "260 tokens" in found.tokenizer and "chat template" in found.tokenizer
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(hf)
    assert "261 tokens" in describe(hf).tokenizer


def test_experts_count_once_for_a_token(tmp_path: Path) -> None:
    """Of a mixture of experts, those that a token goes to are counted apart."""
    model = write_tiny_model("mixtral", tmp_path)
    found = describe(tmp_path)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.active_parameters == found.parameters - experts // 2  # 2 of 4
    assert "4 experts of 80, 2 a token" in description_text(found)


@pytest.mark.parametrize("family", ["phi3", "gemma3_text", "mistral"])
def test_every_kind_of_architecture_has_words(family: str, tmp_path: Path) -> None:
    """Scalings, windows and extra norms are told."""
    write_tiny_model(family, tmp_path)
    text = description_text(describe(tmp_path))
    expected = {
        "phi3": "long scaling",
        "gemma3_text": "norms after attention and MLP",
        "mistral": "window of 5 in 3 layers",
    }
    assert expected[family] in text


def test_our_megatron_checkpoint(megatron: Path) -> None:
    """Who wrote it, the padded vocabulary, stacked tensors with their chunks; from OUT or from what is in it."""
    for path in (megatron, megatron / "release"):
        found = describe(path)
        assert found.problem is None and "by oprd convert import" in found.what
        assert found.architecture is not None and found.vocabulary_padded == 512
        assert "vocabulary 509 (padded to 512)" in description_text(found)
        assert any(tensor.chunks == 3 for tensor in found.tensors) and len(found.files) > 1


@pytest.mark.parametrize(
    ("common", "writer"),
    [
        ({"oprd": {"weight_version": 3}, "iteration": 7}, "a training run of this project, iteration 7"),
        ({"args": {"num_layers": 2}, "iteration": 5}, "Megatron-LM, iteration 5"),
        ({"some": "thing"}, "an unknown writer"),
    ],
)
def test_writers_are_told_apart(common: dict[str, object], writer: str, megatron: Path) -> None:
    """By what each leaves in common.pt; without config.json the model stays unknown, and that is no damage."""
    release = megatron / "release"
    (release / "common.pt").unlink()
    write_common(release, common)
    (release / "run_config.yaml").unlink()
    shutil.rmtree(megatron / "hf")
    found = describe(release)
    assert writer in found.what and found.architecture is None and found.problem is None
    assert "--like" in " ".join(found.notes)


def test_bridge_and_its_settings(megatron: Path) -> None:
    """run_config.yaml names Megatron-Bridge, and its settings stand in for a config.json that is not there."""
    release = megatron / "release"
    (release / "common.pt").unlink()
    write_common(release, {"iteration": 9})
    shutil.rmtree(megatron / "hf")
    found = describe(release)
    assert "Megatron-Bridge, iteration 9" in found.what
    assert (found.settings["num_layers"], found.settings["hidden_size"]) == (3, 48)


def test_a_gguf_file(tmp_path: Path) -> None:
    """Its architecture comes from inside it."""
    write_gguf(tmp_path / "model.gguf", "llama", tiny_gguf_model("llama"))
    found = describe(tmp_path / "model.gguf")
    assert "GGUF" in found.what and found.problem is None and found.architecture is not None


@pytest.mark.parametrize("flags", [{}, {"dtype": "BF16", "tp": 3}])
def test_an_unfinished_conversion_says_how_to_go_on(flags: dict[str, object], megatron: Path, hf: Path) -> None:
    """What is finished, what was begun, and the command with the flags that it was begun with."""
    manifest = json.loads((megatron / "conversion.json").read_text())
    staging = megatron.rename(megatron.with_name("megatron.incomplete"))
    identity = {**manifest["identity"], "layout": [flags.get("tp", 1), 1], "dtype": flags.get("dtype")}
    (name, records), *others = manifest["files"].items()
    lines = [json.dumps(identity), json.dumps({"file": name, "records": records}), '{"torn']
    (staging / JOURNAL).write_text("\n".join(lines))
    (staging / others[0][0]).rename(staging / f"{others[0][0]}.part")
    for path in (staging, megatron):  # also by the name that it would have
        found = describe(path)
        assert found.problem is not None and found.problem.endswith("--resume")
        assert f"oprd convert import {hf} {megatron}" in found.problem
        assert ("--dtype bf16 " in found.problem) == ("--tp 3" in found.problem) == bool(flags)
        assert [name for name, _ in found.files] == [name]
        assert "finished: 1 files" in found.notes[0] and ".part" in found.notes[1]


def test_what_is_torn_is_told(hf: Path, megatron: Path) -> None:
    """A missing tensor, a truncated file, a missing file: described as far as possible, with the reason."""
    weights = hf / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    found = describe(hf)
    assert found.problem is not None and "model.norm.weight" in found.problem and found.tensors
    weights.write_bytes(weights.read_bytes()[:-10])
    found = describe(hf)
    assert found.problem is not None and "truncated" in found.problem and found.architecture is not None
    next((megatron / "release").glob("__0_1.distcp")).unlink()
    found = describe(megatron)
    assert found.problem is not None and "__0_1.distcp" in found.problem
    with pytest.raises(CheckpointError, match="no such"):
        describe(hf / "nothing")


def test_checksums_name_the_damaged_file(megatron: Path, hf: Path) -> None:
    """One flipped bit in one file of a conversion, either way; all other files are good."""
    back = megatron.with_name("back")
    export_megatron(megatron, back, OPTIONS, quiet())
    for place, name in ((megatron, "release/__0_1.distcp"), (back, "model-00002-of-")):
        good = check_checksums(place, quiet())
        assert not good.damaged and good.files > 2 and good.tensors > 3
        victim = next(path for path in place.rglob("*") if str(path.relative_to(place)).startswith(name))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
        (line,) = check_checksums(place, quiet()).damaged
        assert str(victim) in line
    with pytest.raises(CheckpointError, match="no checksums"):
        check_checksums(hf, quiet())


def test_checksums_of_foreign_checkpoints(megatron: Path) -> None:
    """Without conversion.json, the crc32 of each chunk's container is compared."""
    (megatron / "conversion.json").unlink()
    good = check_checksums(megatron, quiet())
    assert not good.damaged and good.tensors > 10
    victim = megatron / "release" / "__0_1.distcp"
    data = bytearray(victim.read_bytes())
    start = data.find(b"PK\x03\x04") + 4000
    data[start] ^= 1
    victim.write_bytes(data)
    assert len(check_checksums(megatron, quiet()).damaged) == 1


def test_the_command_needs_no_torch(megatron: Path) -> None:
    """It starts fast: neither torch nor transformers is imported, whatever is inspected. 0, 1 and 2 as exit codes."""
    code = (
        "import sys\nfrom checkpoints_conversion.commands import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit as e:\n"
        "    code = e.code\nassert not {'torch', 'transformers'} & set(sys.modules)\nsys.exit(code)"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "inspect", *words], capture_output=True, text=True, timeout=120
        )

    plain = run(str(megatron), "--checksums")
    assert plain.returncode == 0 and "0 files damaged" in plain.stdout, plain.stderr
    record = json.loads(run(str(megatron), "--json").stdout)
    assert record["architecture"]["num_layers"] == 3 and record["checksums"] is None
    (megatron / "release" / "__0_1.distcp").unlink()
    assert run(str(megatron)).returncode == 1
