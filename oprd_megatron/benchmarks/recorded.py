"""Grading responses that are on disk already: a file of `oprd rollout`, or responses.jsonl of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oprd_megatron.benchmarks.folder import write_folder
from oprd_megatron.benchmarks.grading import Grader
from oprd_megatron.benchmarks.problems import Problem
from oprd_megatron.benchmarks.results import Response, grade_all
from oprd_megatron.benchmarks.run import question
from oprd_megatron.errors import DataError
from oprd_megatron.rollout.recorded import open_recorded


def grade_recorded(
    path: Path, problems: Sequence[Problem], template: str, boxed_only: bool, out: Path, grader: Grader
) -> dict[str, Any]:
    """Grade a file of responses and write a folder, as `run_benchmark` does. Returns the summary.

    A response belongs to the problem whose text its `prompt` is: as it stands, in the template, or a chat as rollouts show
    it. Problems without a response are left out. If several problems have that text, such as the same one in two files, the
    response counts for each.

    Raises:
        DataError: the file is malformed, or a response belongs to no problem.
    """
    of_text: dict[str, set[int]] = {}
    for number, problem in enumerate(problems):
        chat = "\n".join(f"{message['role']}: {message['content']}" for message in problem.messages)
        for text in (problem.text, question(problem, template), chat):
            of_text.setdefault(text.strip(), set()).add(number)
    found: dict[int, list[Response]] = {}
    file = open_recorded(path)
    for place, row in enumerate(file.read(range(len(file.index.steps))), start=1):
        numbers = of_text.get(row.prompt.strip())
        if numbers is None:
            raise DataError(
                f"{path}: response {place} answers {row.prompt[:60]!r}, which is none of the {len(problems)} problems; give "
                "the file of its problem, and the --template that it was asked with"
            )
        for number in numbers:
            found.setdefault(number, []).append(Response(row.response, row.response_ids, row.finished))
    if not found:
        raise DataError(f"{path}: holds no responses")
    order = sorted(found)
    kept, responses = [problems[number] for number in order], [found[number] for number in order]
    results, grades = grade_all(kept, responses, grader, boxed_only)
    out.mkdir(parents=True, exist_ok=True)
    about = {"made_with": {"file": str(path)}, "boxed_only": boxed_only, "left_out": len(problems) - len(kept)}
    return write_folder(out, kept, responses, results, grades, about)
