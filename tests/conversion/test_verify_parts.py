"""What verify is made of: prompts that reach what they should, differences that mean what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_conversion import read_architecture
from checkpoints_conversion.verify.prompts import make_prompts, read_texts
from checkpoints_conversion.verify.states import StateFile, compare_logits, compare_states
from oprd_megatron.errors import DataError
from tests.tiny_models import ORIGINAL_LENGTH, WINDOW, tiny_hf_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_limits_of_length_are_passed(family: Any, tmp_path: Path) -> None:
    """Some prompt is longer than a short window and than longrope's original length, and one is not; long ones are told."""
    tiny_hf_model(family, tmp_path)
    arch = read_architecture(tmp_path)
    limit = WINDOW if family == "mistral" else ORIGINAL_LENGTH
    for num_tokens in (4, limit, limit + 1, 100):
        lengths = {ids.size(1) for ids in make_prompts(arch, None, num_tokens, None).batches}
        assert max(lengths) > limit and (family == "mistral" or min(lengths) <= limit)
    if family == "mistral":
        far = replace(arch, attention_windows=(4096,) * arch.num_layers)
        assert "the window of 4096 is not passed" in make_prompts(far, None, 8, None).description


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "no text"),
        ("p.jsonl", '{"prompt": "a"}\n{"other": "b"}\n', "line 2"),
        ("p.jsonl", "[1]\n", "line 1"),
        ("p.jsonl", "not json\n", "line 1"),
        ("p.txt", "x\n" * 65, "65 prompts"),
    ],
)
def test_bad_prompts_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """One line that names file and line."""
    tiny_hf_model("llama", tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        make_prompts(read_architecture(tmp_path), tiny_tokenizer(), 8, tmp_path / name)


def test_prompts_are_read(tmp_path: Path) -> None:
    """Lines of text, or of json."""
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert list(read_texts(tmp_path / "p.txt")) == list(read_texts(tmp_path / "p.jsonl")) == ["one", "two"]


def test_no_number_is_never_equal() -> None:
    """A state or logit that is not finite on one side is an infinite difference; each token is measured by itself."""
    a = torch.ones(40, 8)
    a[0] *= 1000  # an attention sink
    b = a.clone()
    b[7, 0] += 0.5
    found = compare_states(a, b)
    assert (found.max_abs, round(found.relative, 4)) == (0.5, round(0.5 / 8**0.5, 4)) and 0.9 < found.cosine < 1
    b[33, 0] = torch.nan
    assert compare_states(a, b).relative == float("inf") and compare_logits(a, b).max_kl == float("inf")
    assert compare_states(a, a).relative == 0 and compare_logits(a, a).kl == 0


def test_kept_states_come_back_in_order() -> None:
    """Whatever their shapes."""
    states = [torch.randn(size, 3) for size in (4, 1, 7)]
    with StateFile() as kept:
        for each in states:
            kept.append(each)
        kept.rewind()
        assert all(torch.equal(kept.next_like(each), each) for each in states)
