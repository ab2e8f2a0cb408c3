"""The end of a turn is what the chat template writes."""

from __future__ import annotations

import pytest

from oprd_megatron.cross_tokenizer import teacher_end_id
from oprd_megatron.errors import DataError
from tests.tiny_models import CHAT_TEMPLATE, EOS_ID, tiny_tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, EOS_ID),
        (CHAT_TEMPLATE.replace("<|im_end|>\n", " <|endoftext|>"), 0),
        (CHAT_TEMPLATE.replace("<|im_end|>\n", "\n###"), EOS_ID),
        ("{{ raise_exception('no') }}", EOS_ID),
        ("{{ messages[0]['content'] }}", EOS_ID),
        (None, EOS_ID),
    ],
)
def test_what_ends_a_turn(template: str | None, expected: int) -> None:
    """The special token after an assistant's message, even after white space; else the end of the sequence."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert teacher_end_id(tokenizer) == expected


def test_nothing_that_ends_a_turn() -> None:
    """Without a template that says it and without eos_token, the message names the file to mend."""
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="set eos_token in its tokenizer_config") as caught:
        teacher_end_id(tokenizer)
    assert "\n" not in str(caught.value)
