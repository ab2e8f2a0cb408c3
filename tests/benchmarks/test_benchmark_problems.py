"""Every published layout is read; every mistake is one line with file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oprd_megatron.benchmarks.problems import Problem, read_problems
from oprd_megatron.errors import DataError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LAYOUTS = {
    "aime24.json": {"prompt": "Find $x$.", "answer": "204", "source": "aime", "id": "0"},
    "aime25.json": {"prompt": "Find $x$.", "answer": "204"},
    "aimo.json": {"prompt": "Find $x$.", "answer": "204", "source": "amc", "id": "0"},
    "math-500.json": {"prompt": "Find $x$.", "answer": "204", "source": "math", "id": "test/precalculus/807.json"},
    "math.jsonl": {"problem": "Find $x$.", "solution": r"First, \boxed{1}. So $\boxed{204}$.", "unique_id": "a/1"},
    "qa.jsonl": {"question": "Find $x$.", "answer": 204},
    "dapo.parquet": {
        "data_source": "math_dapo",
        "prompt": [{"content": "Find $x$.", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "204", "style": "rule"},
        "extra_info": {"index": "9a9b6eb4"},
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognised(tmp_path: Path, name: str) -> None:
    """The structure of each published file, by its own names."""
    (problem,) = read_problems([write(tmp_path / name, [LAYOUTS[name]])])
    assert (problem.text, problem.gold, problem.benchmark) == ("Find $x$.", "204", Path(name).stem)
    ids = {"aime24.json": "0", "aimo.json": "0", "math-500.json": "test/precalculus/807.json", "math.jsonl": "a/1"}
    assert problem.id == {**ids, "dapo.parquet": "9a9b6eb4"}.get(name, "1")


def test_named_fields_and_limit(tmp_path: Path) -> None:
    """Fields by name, dots leading inside; the limit counts each file's rows."""
    rows = [{"prompt": "no", "answer": "no", "q": f"q{i}", "meta": {"gold": f"${i}$"}} for i in range(3)]
    files = [write(tmp_path / name, rows) for name in ("a.jsonl", "b.json")]
    problems = read_problems(files, "q", "meta.gold", 2)
    assert [(p.benchmark, p.id, p.text, p.gold) for p in problems] == [
        (name, str(i + 1), f"q{i}", str(i)) for name in "ab" for i in range(2)
    ]


def test_chat_keeps_its_system_message(tmp_path: Path) -> None:
    """All messages are asked; the last is the text."""
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    (problem,) = read_problems([write(tmp_path / "c.jsonl", [{"prompt": chat, "answer": "2"}])])
    assert isinstance(problem, Problem) and problem.messages == tuple(chat) and problem.text == "1+1?"


GOOD = {"prompt": "p", "answer": "1"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"prompt": "p"}], "x.jsonl:2: no field 'answer'"),
        ([{"text": "p", "answer": "1"}], "x.jsonl: no field is known to hold the problem (problem, question, prompt)"),
        ([{"prompt": "p", "result": "1"}], "the fields are prompt, result: name it with --answer-field"),
        ([GOOD, {"prompt": "p", "answer": "  "}], "x.jsonl:2: 'answer' is empty"),
        ([GOOD, {"prompt": "p", "answer": "$$"}], "x.jsonl:2: 'answer' is empty"),
        ([GOOD, {"prompt": " ", "answer": "1"}], "x.jsonl:2: 'prompt' is empty"),
        ([GOOD, {"prompt": "p", "answer": None}], "x.jsonl:2: 'answer' must be text or a number; it is 'None'"),
        ([GOOD, {"prompt": "p", "answer": True}], "x.jsonl:2: 'answer' must be text or a number"),
        ([GOOD, {"prompt": [], "answer": "1"}], "x.jsonl:2: 'prompt' must be text or a list of chat messages"),
        ([{"prompt": "p", "solution": "so 5"}], "x.jsonl:1: 'solution' has no \\boxed answer"),
        ([{"prompt": "p", "reward_model": {"style": "rule"}}], "x.jsonl:1: no field 'reward_model.ground_truth'"),
        ([{**GOOD, "id": "7"}, {**GOOD, "id": 7}], "x.jsonl:2: has the id '7' of"),
        ([{**GOOD, "id": 1.5}], "x.jsonl:1: the id is '1.5'"),
        ([], "holds no problems"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    """File and row, what is wrong, and where there is a choice, what to do."""
    with pytest.raises(DataError) as error:
        read_problems([write(tmp_path / "x.jsonl", rows)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    """Missing, not JSON, not a list, not parquet, another ending."""
    texts = {
        "a.json": "{",
        "b.json": "{}",
        "c.jsonl": "nonsense\n",
        "d.parquet": "nonsense",
        "e.txt": "",
        "g.json": "[3]",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for name in (*texts, "missing.json"):
        with pytest.raises(DataError) as error:
            read_problems([tmp_path / name])
        assert name in str(error.value) and "\n" not in str(error.value)
