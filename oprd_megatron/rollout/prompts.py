"""Prompts as token ids, and the order in which a run reads them.

A file becomes a list of `Prompt`s once, at start-up. After that the prompts of a step are a pure function of
(seed, step): a resumed run needs no data cursor besides its step.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from oprd_megatron.config.rollout import PromptsConfig, template_fields
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.prompt_files import Place, Row, read_fields

logger = logging.getLogger(__name__)

TOKENIZE_AT_ONCE = 1024
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the models."""

    index: int
    """Position in the list that `load_prompts` returned."""
    text: str
    """As the file has it, for display."""
    token_ids: tuple[int, ...]
    """With the chat template, if one was applied."""
    teacher_ids: tuple[int, ...] = ()
    """The same for a teacher with another tokenizer or with privileged text; empty where both read the same ids."""
    source: str = ""
    """Of several teachers, the name of the one that teaches it; empty where all do."""


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None = None,
    routes: Routes | None = None,
) -> list[Prompt]:
    """Read, wrap and tokenise a file of prompts, also for a `teacher` with another tokenizer or `teacher_template`. `routes`
    say which of several teachers teaches a row.

    `config.limit` counts rows of the file and stops the reading there. Equal rows are tokenised once and share their
    ids (the published DAPO-Math-17k repeats each prompt about 100 times: 1.79 million rows).

    Raises:
        DataError: the file cannot be read, a prompt is malformed or goes to no teacher (the message names its line), or none
            is left.
    """
    path = config.path
    readers: list[tuple[PreTrainedTokenizerBase, str | None]] = [(tokenizer, None)]
    if teacher is not None or config.teacher_template is not None:
        readers.append((teacher or tokenizer, config.teacher_template))
    for reader, _ in readers if config.chat_template else []:
        if reader.chat_template is None:
            whose = "" if teacher is None else " of the student" if reader is tokenizer else " of the teacher"
            raise DataError(
                f"{path}: chat_template is true, but the tokenizer{whose} has no chat template; set chat_template: false to "
                "feed the raw text, or use a chat model's tokenizer files"
            )
    prompts: list[Prompt] = []
    known: list[dict[str, tuple[int, ...]]] = [{} for _ in readers]
    fields = [config.field, *(name for name in template_fields(config.teacher_template or "") if name != "prompt")]
    rows = islice(read_fields(path, [*fields, *([routes.field] if routes else [])]), config.limit)
    num_rows = 0
    while chunk := list(islice(rows, TOKENIZE_AT_ONCE)):
        num_rows += len(chunk)
        ids = []
        for (reader, template), seen in zip(readers, known, strict=True):
            wrapped = tuple(_text(row, config, reader, template) for row in chunk)
            _tokenize(wrapped, seen, reader, special=not config.chat_template)
            ids.append([seen[text] for text in wrapped])
        for row, *read in zip(chunk, *ids, strict=True):
            source = routes.teacher_of(row[1][routes.field], row[0]) if routes else ""
            if max(map(len, read)) <= config.max_tokens:
                teacher_ids = read[1] if len(read) > 1 else ()
                prompts.append(Prompt(len(prompts), _shown(row, config), read[0], teacher_ids, source))
    if num_rows == 0:
        raise DataError(f"{path}: holds no prompts")
    if not prompts:
        raise DataError(f"{path}: all {num_rows} prompts are over max_tokens {config.max_tokens}; raise max_tokens")
    if len(prompts) < num_rows:
        logger.warning("%s: left out %d of %d prompts, over %d tokens", path, num_rows - len(prompts), num_rows,
                       config.max_tokens)  # fmt: skip
    return prompts


@dataclass(frozen=True)
class Routes:
    """The way from a row to its teacher.

    Attributes:
        field: of the row that says so.
        to: {value: teacher}; a value that is not there is a teacher's name.
        teachers: names.
    """

    field: str
    to: dict[str, str]
    teachers: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig) -> Routes | None:
        """A run's; None where every prompt goes to every teacher."""
        teaching = config.teaching
        if teaching is None or teaching.by == "average":
            return None
        return cls(teaching.field, teaching.to, tuple(teacher.name for teacher in config.teachers))

    def teacher_of(self, value: Any, place: Place) -> str:
        """Name of the teacher.

        Raises:
            DataError: there is none.
        """
        name = self.to.get(str(value), str(value))
        if name not in self.teachers:
            raise DataError(
                f"{place}: {self.field} {str(value)[:60]!r} goes to no teacher (there are {', '.join(self.teachers)}); add it "
                "to teaching.to, or leave the row out"
            )
        return name


def refuse_overlap(train: list[Prompt], held_out: list[Prompt], path: Path | str) -> None:
    """Held-out prompts must not be trained on.

    Args:
        train: Training prompts.
        held_out: Held-out prompts.
        path: The held-out file, for the message.

    Raises:
        DataError: a held-out prompt has the token ids of a training prompt.
    """
    trained = {prompt.token_ids for prompt in train}
    shared = [prompt for prompt in held_out if prompt.token_ids in trained]
    if shared:
        text = shared[0].text if len(shared[0].text) <= 60 else shared[0].text[:57] + "..."
        raise DataError(
            f"{path}: {len(shared)} of {len(held_out)} held-out prompts are training prompts too, the first is {text!r}"
            "; remove them from one of the files"
        )


@functools.lru_cache(maxsize=4)
def prompt_order(num_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of one epoch: a permutation of range(num_prompts) that depends on nothing but the arguments."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist())


@dataclass(frozen=True)
class PromptSource:
    """Shuffled epochs over a list of prompts, without state.

    Each epoch holds every prompt once. A batch may cross into the next epoch; only there can it hold a prompt twice.
    """

    prompts: list[Prompt]
    seed: int

    def batch(self, step: int, prompts_per_step: int) -> list[Prompt]:
        """The prompts of one step; steps count from 0."""
        return [self._at(step * prompts_per_step + offset) for offset in range(prompts_per_step)]

    def _at(self, position: int) -> Prompt:
        epoch, slot = divmod(position, len(self.prompts))
        return self.prompts[prompt_order(len(self.prompts), self.seed, epoch)[slot]]


def _shown(row: Row, config: PromptsConfig) -> str:
    """A row's prompt, to show."""
    place, values = row
    messages = _messages(values[config.field], place, config.field)
    return messages[0]["content"] if len(messages) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def _text(row: Row, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """A row's prompt to tokenise, its last message put into `template` if there is one."""
    place, values = row
    messages = _messages(values[config.field], place, config.field)
    if template is not None:
        messages[-1] = {**messages[-1], "content": _filled(template, messages[-1]["content"], values, place)}
    if config.chat_template:
        return _wrap(messages, place, tokenizer)
    if not isinstance(values[config.field], str):
        raise DataError(
            f"{place}: {config.field!r} is a list of chat messages; set chat_template: true, or give a string"
        )
    return messages[0]["content"]


def _filled(template: str, prompt: str, values: dict[str, Any], place: Place) -> str:
    try:
        return template.format(**{**values, "prompt": prompt})
    except (LookupError, AttributeError, ValueError, TypeError) as error:
        raise DataError(f"{place}: teacher_template cannot be filled in ({error}); look at the row's fields") from None


def _messages(value: Any, place: Place, field: str) -> list[Message]:
    """The prompt as chat messages; a string is one message of the user."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise DataError(
            f"{place}: {field!r} must be a string or a list of chat messages {{role, content}} of strings; "
            f"it is {str(value)[:60]!r}"
        )
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{place}: {field!r} is empty")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _wrap(messages: list[Message], place: Place, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except jinja2.TemplateError as error:
        raise DataError(f"{place}: the tokenizer's chat template refuses this prompt ({error})") from None


def _tokenize(
    texts: tuple[str, ...], known: dict[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, special: bool
) -> None:
    """Add the ids of `texts` to `known`. A chat template writes its own special tokens: `special` is then False."""
    new = list(dict.fromkeys(text for text in texts if text not in known))
    if new:
        known.update(zip(new, map(tuple, tokenizer(new, add_special_tokens=special)["input_ids"]), strict=True))
