"""Companions of a model: what is copied, and every way in which a tokenizer can fail to fit its model."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from checkpoints_conversion import read_architecture
from checkpoints_conversion.formats import copy_companions
from checkpoints_conversion.tokenizer import check_tokenizer, companion_files
from oprd_megatron.errors import CheckpointError
from tests.tiny_models import tiny_config, tiny_tokenizer

PIECES = 300


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """config.json and tokenizer of a tiny Llama that fit each other; no weights."""
    tiny_config("llama").save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece model of 300 pieces, trained as Llama's was: byte fallback, digits alone."""
    out = io.BytesIO()
    text = [
        "the quick brown fox jumps over the lazy dog in 2024 and 1999",
        "hello world, two  spaces: don't",
        "naïve café",
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=out,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def check(model: Path, strict: bool = True) -> list[str]:
    """The notes, each one short line."""
    notes = check_tokenizer(model, read_architecture(model), strict)
    assert all("\n" not in note and len(note) < 400 for note in notes)
    return notes


def refused(model: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        check(model)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400
    return str(refusal.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file."""
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


def test_a_fitting_tokenizer_has_no_notes(model: Path) -> None:
    """Nothing to say about a model as it should be."""
    assert check(model) == []


def test_companions_are_what_belongs_to_the_model(model: Path, tmp_path: Path) -> None:
    """Config, tokenizer, templates and licence; no weights, no code, nothing that is not known."""
    for name in ("LICENSE", "NOTICE.txt", "generation_config.json", "merges.txt", "tokenizer.model", "qwen.tiktoken"):
        (model / name).write_text("{}")
    for name in ("model.safetensors", "pytorch_model.bin", "modeling_x.py", "README.md", "training_args.bin", "x.gguf"):
        (model / name).write_text("")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    found = {str(path.relative_to(model)) for path in companion_files(model)}
    assert found == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        *("merges.txt", "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
        *("LICENSE", "NOTICE.txt"),
    }
    out = tmp_path / "out"
    out.mkdir()
    assert copy_companions(model, out) == []
    for name in found:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == found


def test_companions_of_a_cache_snapshot_are_copied_others_are_not(model: Path, tmp_path: Path) -> None:
    """A link to the cache's blobs is a companion; a link to anywhere else is refused by name."""
    home = tmp_path / "models--tiny"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.glob("*.json"))):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert len(companion_files(snapshot)) == 3
    (tmp_path / "secret").write_text("password")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE: leads out of its directory"):
        companion_files(snapshot)


def test_more_tokens_than_rows_is_refused(model: Path) -> None:
    """An id that the embedding does not have; `strict=False` tells it instead."""
    arch = read_architecture(model)
    assert check_tokenizer(model, replace(arch, vocab_size=260)) == []
    with pytest.raises(CheckpointError, match="token ids up to 259, but the model's vocab_size is 259"):
        check_tokenizer(model, replace(arch, vocab_size=259))
    (note,) = check_tokenizer(model, replace(arch, vocab_size=259), strict=False)
    assert "up to 259" in note


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("token", ["bos", "eos", "pad"])
def test_special_ids_agree(token: str, name: str, model: Path) -> None:
    """An id beyond the vocabulary, one that is no token, or not the tokenizer's, is told; lists may agree."""
    own = {"bos": 0, "eos": 2, "pad": 3}[token]
    key = f"{token}_token_id"
    edit(model / name, lambda config: config.update({key: [own, 1] if token == "eos" else own}))
    assert check(model) == []
    edit(model / name, lambda config: config.update({key: 1}))
    assert check(model) == [f"{model / name}: {key} is 1, the tokenizer's is {own}"]
    edit(model / name, lambda config: config.update({key: 280}))
    assert f"{model / name}: {key} 280 is no token of the tokenizer" in check(model)
    for beyond in (288, -2):
        edit(model / name, lambda config, beyond=beyond: config.update({key: beyond}))  # type: ignore[misc]
        assert f"{model / name}: {key} is {beyond}, but ids go from 0 to 287" in check(model)[0]
    for wrong in ("2", 1.5, [2, 10**30], {"a": 1}, True):
        edit(model / name, lambda config, wrong=wrong: config.update({key: wrong}))  # type: ignore[misc]
        try:
            assert f"{model / name}: {key} is" in check(model)[0]
        except CheckpointError as refusal:  # transformers reads config.json too
            assert key in str(refusal) and name == "config.json"
    for fine in (None, -1):
        edit(model / name, lambda config, fine=fine: config.update({key: fine}))  # type: ignore[misc]
        assert check(model) == []


def test_a_missing_template_is_told(model: Path) -> None:
    """So are one that fails and one that forgets what the user said."""
    (model / "chat_template.jinja").write_text("{{ raise_exception('only\\nsystem') }}")
    assert "does not render a user's message (only)" in check(model)[0]
    (model / "chat_template.jinja").write_text("{{ messages | length }}")
    assert "leaves out a user's message" in check(model)[0]
    (model / "chat_template.jinja").write_text("{% for")
    assert "does not render" in check(model)[0]
    (model / "chat_template.jinja").unlink()
    assert check(model) == [f"{model}: no chat template"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1, "a": 2}', '{"x": ' + "[" * 100_000, "\x00\xff"])
def test_broken_files_are_named(content: str, name: str, model: Path) -> None:
    """A file that is no JSON object is refused by its name."""
    (model / name).write_text(content)
    assert str(model / name) in refused(model)


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": null}'])
def test_a_tokenizer_that_is_none_is_named(content: str, model: Path) -> None:
    """JSON, but no tokenizer."""
    (model / "tokenizer.json").write_text(content)
    assert str(model / "tokenizer.json") in refused(model)


def test_no_tokenizer_is_told(tmp_path: Path) -> None:
    """A model may be converted without one."""
    tiny_config("llama").save_pretrained(tmp_path)
    assert check(tmp_path) == [f"{tmp_path}: no tokenizer; the model is converted without one"]


def test_code_is_neither_run_nor_copied(model: Path, tmp_path: Path) -> None:
    """A tokenizer that only code of the repository's own can read: told, and the code leaves no trace."""
    sentinel = tmp_path / "sentinel"
    (model / "tokenization_x.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass XTokenizer: pass\n")
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "tokenizer_class": "XTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(auto))
    (model / "tokenizer.json").unlink()
    notes = check(model)
    assert "code is not copied: tokenization_x.py" in notes[0] and "copied unchecked" in notes[1]
    assert not sentinel.exists() and model / "tokenization_x.py" not in companion_files(model)


def write_sentencepiece(model: Path, pieces: bytes) -> None:
    """A Llama tokenizer as .model, with the tokenizer.json that transformers makes of it."""
    for path in model.glob("tokenizer*"):
        path.unlink()
    (model / "tokenizer.model").write_bytes(pieces)
    LlamaTokenizer.from_pretrained(model).save_pretrained(model)
    edit(model / "config.json", lambda config: config.update(vocab_size=PIECES + 10, bos_token_id=1, eos_token_id=2))
    edit(model / "config.json", lambda config: config.pop("pad_token_id"))


def test_sentencepiece_alone(model: Path, pieces: bytes) -> None:
    """A directory with nothing but tokenizer.model is checked too."""
    write_sentencepiece(model, pieces)
    (model / "tokenizer.json").unlink()
    assert all("tokenizer.model" in note or "chat template" in note for note in check(model))
    edit(model / "config.json", lambda config: config.update(vocab_size=PIECES - 10))
    assert "token ids up to" in refused(model)


def test_two_tokenizers_must_cut_alike(model: Path, pieces: bytes) -> None:
    """tokenizer.model beside tokenizer.json: the first string for which they differ is told."""
    write_sentencepiece(model, pieces)
    first = check(model)
    (model / "tokenizer.json").unlink()
    tiny_tokenizer(model)
    assert "tokenizer.model: for 7 of 7 texts other ids than tokenizer.json: 'Hello world' and" in check(model)[-1]
    (note,) = (note for note in first if "other ids" in note)
    assert "for 1 of 7 texts" in note and note.endswith("' x'"), "transformers adds no space before a space"


def test_a_broken_sentencepiece_model_is_named(model: Path, pieces: bytes) -> None:
    """Damage in tokenizer.model is refused by its name; a tiktoken file of that name is told."""
    (model / "tokenizer.model").write_bytes(pieces[: len(pieces) // 2])
    assert str(model / "tokenizer.model") in refused(model)
    (model / "tokenizer.model").write_bytes(b"")
    assert str(model / "tokenizer.model") in refused(model)
    (model / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "a tiktoken vocabulary" in check(model)[0]


def test_a_pipe_does_not_hang(model: Path) -> None:
    """A named pipe in place of a file is no tokenizer."""
    (model / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer.json")
    os.mkfifo(model / "tokenizer.model")
    refused(model)
