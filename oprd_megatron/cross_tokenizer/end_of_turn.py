"""What ends an assistant's turn in a tokenizer."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from oprd_megatron.errors import DataError

MARK = "~oprd~"


def teacher_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends an assistant's turn.

    It is what the chat template writes right after an assistant's message, white space aside, if that is one special
    token; else the end-of-sequence token.

    Raises:
        DataError: there is neither.
    """
    after = _after_assistant(tokenizer)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(after, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
    if ids and ids[0] in special:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no token that ends a turn; set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _after_assistant(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an assistant's message; "" without a template for plain conversations."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError):
        return ""
    return written.rpartition(MARK)[2].lstrip() if MARK in written else ""
