"""Tokenizers that do not fit their model or each other are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from oprd_megatron.errors import CheckpointError, DataError
from oprd_megatron.rollout import check_same_tokenizer, check_tokenizer, load_tokenizer
from tests.tiny_models import TOKENIZER_SIZE, tiny_tokenizer


def test_a_saved_tokenizer_comes_back(tmp_path: Path) -> None:
    """Loading gives equal vocabulary, template and special tokens."""
    saved = tiny_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(saved, loaded)
    assert loaded.chat_template == saved.chat_template
    assert loaded.eos_token_id == saved.eos_token_id


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    """A missing directory, one without tokenizer files, a broken file and one that wants to run code."""
    (tmp_path / "empty").mkdir()
    tiny_tokenizer(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    for name, message in [("none", "no such directory"), ("empty", "copy the model's"), ("broken", "cannot load")]:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_ids_must_fit_the_embedding() -> None:
    """Padding rows in the embedding are fine; an id without a row is not."""
    tokenizer = tiny_tokenizer()
    check_tokenizer(tokenizer, TOKENIZER_SIZE, "model")
    check_tokenizer(tokenizer, TOKENIZER_SIZE + 28, "model")
    with pytest.raises(DataError, match=f"model: .*up to {TOKENIZER_SIZE - 1}, .*vocab_size is {TOKENIZER_SIZE - 1}"):
        check_tokenizer(tokenizer, TOKENIZER_SIZE - 1, "model")


def test_different_vocabularies_are_refused() -> None:
    """A token more on either side, or two that changed places, is named with both ids."""
    plain, longer = tiny_tokenizer(), tiny_tokenizer(extra_tokens=("zebra",))
    check_same_tokenizer(plain, tiny_tokenizer())
    with pytest.raises(DataError, match="'zebra': id 260 and None"):
        check_same_tokenizer(longer, plain)
    with pytest.raises(DataError, match="'zebra': id None and 260"):
        check_same_tokenizer(plain, longer)
    with pytest.raises(DataError, match="'ab': id 260 and 261"):
        check_same_tokenizer(tiny_tokenizer(extra_tokens=("ab", "cd")), tiny_tokenizer(extra_tokens=("cd", "ab")))


def test_same_vocabulary_cut_differently_is_refused() -> None:
    """Equal vocabularies do not make equal ids: a text must be cut the same way too."""
    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(DataError, match="same vocabulary but cut text differently"):
        check_same_tokenizer(tiny_tokenizer(), other)
