"""Which model, which tokenizer: equal for the same weights however they are stored, different for any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion.families import read_architecture
from oprd_megatron.bridge.fingerprint import ModelFingerprint, model_fingerprint, tokenizer_fingerprint
from oprd_megatron.errors import CheckpointError
from tests.tiny_models import tiny_hf_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fingerprint") / "model"
    tiny_hf_model("qwen2", folder)
    return folder


def fingerprint(folder: Path) -> ModelFingerprint:
    return model_fingerprint(folder, read_architecture(folder))


def copy_with(model_dir: Path, folder: Path, change: str, value: torch.Tensor | None = None) -> Path:
    """The model with one tensor changed: a row of it if `value` is None, else replaced."""
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    name, _, row = change.partition(":")
    if value is None:
        tensors[name][int(row)] += 1.0
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_says_what_the_model_is(model_dir: Path) -> None:
    """The sizes of the messages are the model's."""
    found = fingerprint(model_dir)
    assert (found.path, found.family, found.width, found.layers, found.vocab) == (str(model_dir), "qwen2", 32, 4, 288)


def test_storage_does_not_count(model_dir: Path, tmp_path: Path) -> None:
    """One file, several in any order, a .bin with the tied head stored twice, an old .bin: one fingerprint."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    tensors = load_file(model_dir / "model.safetensors")
    weight_map = {name: f"model-{'2' if name < 'model.layers.2' else '1'}.safetensors" for name in tensors}
    shutil.copytree(model_dir, tmp_path / "unordered", ignore=shutil.ignore_patterns("*.safetensors"))
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / "unordered" / file)
    index = tmp_path / "unordered" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    state = dict(model.state_dict())
    assert "lm_head.weight" in state
    for name, zipped in (("bin", True), ("old", False)):
        (tmp_path / name).mkdir()
        shutil.copyfile(model_dir / "config.json", tmp_path / name / "config.json")
        torch.save(state, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    mine = fingerprint(model_dir)
    for name in ("split", "unordered", "bin", "old"):
        other = fingerprint(tmp_path / name)
        assert mine.difference(other) is None
        assert mine.model_dump(exclude={"path"}) == other.model_dump(exclude={"path"})


@pytest.mark.parametrize(
    "change",
    [
        "model.embed_tokens.weight:144",
        "model.layers.3.mlp.down_proj.weight:16",
        "model.layers.0.self_attn.q_proj.bias:0",
        "model.norm.weight:31",
    ],
)
def test_other_weights_differ(model_dir: Path, tmp_path: Path, change: str) -> None:
    """The middle row of every matrix counts, and every element of a vector."""
    other = fingerprint(copy_with(model_dir, tmp_path / "other", change))
    assert fingerprint(model_dir).difference(other) == "weights"


def test_two_equal_tensors_that_change_places_differ(model_dir: Path, tmp_path: Path) -> None:
    """Each value counts under its name: two layers' norms exchanged are another model."""
    tensors = load_file(model_dir / "model.safetensors")
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    once = copy_with(model_dir, tmp_path / "once", names[0], tensors[names[1]])
    twice = copy_with(once, tmp_path / "twice", names[1], tensors[names[0]])
    assert fingerprint(model_dir).difference(fingerprint(twice)) == "weights"


def test_another_dtype_differs(model_dir: Path, tmp_path: Path) -> None:
    """A rounded copy is another model."""
    name = "model.layers.1.mlp.up_proj.weight"
    value = load_file(model_dir / "model.safetensors")[name].bfloat16()
    assert (
        fingerprint(model_dir).difference(fingerprint(copy_with(model_dir, tmp_path / "o", name, value))) == "weights"
    )


def test_what_it_cannot_see(model_dir: Path, tmp_path: Path) -> None:
    """The documented limit: a single row beside the middle one."""
    other = fingerprint(copy_with(model_dir, tmp_path / "other", "model.embed_tokens.weight:0"))
    assert fingerprint(model_dir).difference(other) is None


def test_another_config_differs(model_dir: Path) -> None:
    """Weights say nothing of a rotary base; fields at their default do not count, so that later versions may add some."""
    arch = read_architecture(model_dir)
    mine = model_fingerprint(model_dir, arch)
    other = model_fingerprint(model_dir, dataclasses.replace(arch, rotary_base=5e5))
    assert mine.difference(other) == "config (their sizes are equal)"
    other = model_fingerprint(model_dir, dataclasses.replace(arch, embedding_scale=2.0))
    assert mine.difference(other) == "config (their sizes are equal)"

    later = dataclasses.make_dataclass("Architecture", [("added_later", int, 0)], bases=(type(arch),), frozen=True)
    values = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    assert model_fingerprint(model_dir, later(**values)).config == mine.config
    assert model_fingerprint(model_dir, later(**values, added_later=1)).config != mine.config


def test_it_reads_little(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of each matrix: a large model takes seconds."""
    from checkpoints_conversion.reader import HFReader

    sizes: dict[str, int] = {}
    read = HFReader.read_into

    def counted(
        self: HFReader, name: str, row: int, rows: int, columns: tuple[int, int] | None, out: memoryview
    ) -> None:
        assert name not in sizes and (rows == 1 or len(self.shape(name)) == 1)
        sizes[name] = len(out)
        read(self, name, row, rows, columns, out)

    monkeypatch.setattr(HFReader, "read_into", counted)
    fingerprint(model_dir)
    assert sizes["model.embed_tokens.weight"] == 4 * 32
    assert sizes.keys() == load_file(model_dir / "model.safetensors").keys()


def test_a_broken_model_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    """What is refused before a run is refused here."""
    folder = copy_with(model_dir, tmp_path / "o", "model.norm.weight", torch.zeros(31))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \[31\], but config.json implies \[32\]"):
        fingerprint(folder)


def test_tokenizers_differ_by_what_they_cut() -> None:
    """A token more or less differs; a chat template does not."""
    mine = tokenizer_fingerprint(tiny_tokenizer())
    assert mine == tokenizer_fingerprint(tiny_tokenizer(chat_template=False))
    assert mine != tokenizer_fingerprint(tiny_tokenizer(extra_tokens=("added",)))
    from tokenizers import pre_tokenizers

    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert other.get_vocab() == tiny_tokenizer().get_vocab() and mine != tokenizer_fingerprint(other)
