"""Problems with their right answers, from the files in which benchmarks are published.

    [{"prompt": "..", "answer": "204", "source": "aime", "id": "0"}, ..]               AIME, AIMO, MATH-500 as .json
    {"problem": "..", "solution": "... \\boxed{204}", "unique_id": ".."}               MATH as .jsonl
    prompt: [{role, content}], reward_model: {ground_truth}, extra_info: {index}       DAPO-Math as .parquet

Fields are recognised by these names, or named by the caller.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oprd_megatron.benchmarks.answers import boxed_in
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.prompt_files import Place, read_fields

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "reward_model.ground_truth", "solution")
ID_FIELDS = ("id", "unique_id", "extra_info.index")

Message = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        benchmark: name of its file, without ending.
        id: in its benchmark; the row's number (from 1) where the file has none.
        messages: the question as chat; one message of the user where the file has text.
        gold: the right answer, as LaTeX without \\boxed and dollar signs.
        place: file and row, for messages.
    """

    benchmark: str
    id: str
    messages: tuple[Message, ...]
    gold: str
    place: Place

    @property
    def text(self) -> str:
        """The question, to show: of chat, the last message."""
        return self.messages[-1]["content"]


def read_problems(
    files: Sequence[Path], problem_field: str | None = None, answer_field: str | None = None, limit: int | None = None
) -> list[Problem]:
    """The problems of several files, in order; `limit` counts each file's.

    Raises:
        DataError: a file or field is missing, a problem or answer is empty or of another type, or two problems of a file have
            one id; the message names file and row.
    """
    return [problem for path in files for problem in _of_file(path, problem_field, answer_field, limit)]


def _of_file(path: Path, problem_field: str | None, answer_field: str | None, limit: int | None) -> list[Problem]:
    names = _field_names(path)
    ask = problem_field or _recognised(path, names, PROBLEM_FIELDS, "the problem", "--problem-field")
    answer = answer_field or _recognised(path, names, ANSWER_FIELDS, "the right answer", "--answer-field")
    name = next((field for field in ID_FIELDS if _top(field) in names), None)
    fields = [_top(ask), _top(answer), *([_top(name)] if name else [])]
    problems: list[Problem] = []
    seen: dict[str, Place] = {}
    for place, row in islice(read_fields(path, fields), limit):
        number = str(len(problems) + 1)
        identity = number if name is None else _identity(_inside(row, name, place), number, place)
        if identity in seen:
            raise DataError(f"{place}: has the id {identity!r} of {seen[identity]}; give each problem its own")
        seen[identity] = place
        messages, gold = (
            _messages(_inside(row, ask, place), place, ask),
            _gold(_inside(row, answer, place), place, answer),
        )
        problems.append(Problem(path.stem, identity, messages, gold, place))
    if not problems:
        raise DataError(f"{path}: holds no problems")
    return problems


def _field_names(path: Path) -> list[str]:
    """Fields of a file's first row; none where it has no first row. A file that cannot be read is an error of `read_fields`."""
    if path.suffix == ".parquet" and path.is_file():
        with contextlib.suppress(pa.ArrowInvalid):
            return list(pq.ParquetFile(path).schema_arrow.names)
    first = next(_first_items(path), None)
    if isinstance(first, dict):
        return list(first)
    next(read_fields(path, [PROBLEM_FIELDS[0]]), None)  # says what is wrong with it
    raise DataError(f"{path}: holds no problems")


def _first_items(path: Path) -> Iterator[Any]:
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        return
    with contextlib.suppress(ValueError):
        if path.suffix == ".json":
            items = json.loads(path.read_bytes())
            yield from items if isinstance(items, list) else []
            return
        with path.open("rb") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def _recognised(path: Path, names: Sequence[str], known: Sequence[str], what: str, option: str) -> str:
    found = next((field for field in known if _top(field) in names), None)
    if found is None:
        raise DataError(
            f"{path}: no field is known to hold {what} ({', '.join(known)}); the fields are {', '.join(names)}: name it with "
            f"{option}"
        )
    return found


def _top(field: str) -> str:
    return field.split(".")[0]


def _inside(row: dict[str, Any], field: str, place: Place) -> Any:
    """The value of a field; dots lead into objects."""
    value: Any = row
    for depth, key in enumerate(parts := field.split(".")):
        if not isinstance(value, dict) or key not in value:
            there = f"; {'.'.join(parts[:depth])!r} has {', '.join(value) or 'none'}" if isinstance(value, dict) else ""
            raise DataError(f"{place}: no field {field!r}{there}")
        value = value[key]
    return value


def _identity(value: Any, number: str, place: Place) -> str:
    if value is None:
        return number
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise DataError(f"{place}: the id is {str(value)[:60]!r}, expected text or a whole number")


def _messages(value: Any, place: Place, field: str) -> tuple[Message, ...]:
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(_is_message(item) for item in items):
        raise DataError(
            f"{place}: {field!r} must be text or a list of chat messages {{role, content}}; it is {str(value)[:60]!r}"
        )
    if not items[-1]["content"].strip():
        raise DataError(f"{place}: {field!r} is empty")
    return tuple({"role": item["role"], "content": item["content"]} for item in items)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _gold(value: Any, place: Place, field: str) -> str:
    """The right answer: of a solution its last \\boxed; numbers as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{place}: {field!r} must be text or a number; it is {str(value)[:60]!r}")
    text = str(value)
    if field.split(".")[-1] == "solution" and boxed_in(text) is None:
        raise DataError(f"{place}: {field!r} has no \\boxed answer; name another field with --answer-field")
    boxed = boxed_in(text)
    gold = (text if boxed is None else boxed).strip()
    if len(gold) > 1 and gold[0] == gold[-1] == "$":
        gold = gold.strip("$").strip()
    if not gold:
        raise DataError(f"{place}: {field!r} is empty")
    return gold
