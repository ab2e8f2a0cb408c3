"""The teacher is the student's own copy, frozen or slowly averaged, and reads a privileged prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from oprd_megatron.config import parse_config
from oprd_megatron.errors import DataError
from oprd_megatron.preflight import preflight
from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout
from tests.training.test_bad_input import refusal
from tests.training.test_resume import assert_close, in_one_part, in_two_parts

Values = dict[str, Any]
TEMPLATE = "{prompt} the answer is {answer}"


def self_run(values: Values, tmp_path: Path, template: str | None = TEMPLATE, **teacher: Any) -> Values:
    """The student teaches itself; every prompt has an answer."""
    for name, first in (("train", 0), ("held_out", 50)):
        rows = [{"prompt": f"say {n}", "answer": str(n * n)} for n in range(first, first + 12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = changed(values, teacher={"path": values["student"]["path"], **teacher})
    for section in ("rollout", "eval"):
        values[section]["prompts"] = {**values[section]["prompts"], "teacher_template": template}
    return {**values, "output": {"terms": [{"kind": "full"}]}}


def test_without_privileged_text_the_copy_has_nothing_to_teach(tmp_path: Path, values: Values) -> None:
    """A frozen copy that reads the same gives 0 in every term, and its states agree; with privileged text neither."""
    for template, teaches in ((None, False), (TEMPLATE, True)):
        run = changed(self_run(values, tmp_path, template), run={"dir": str(tmp_path / str(teaches)), "steps": 1})
        record = train_records(train_run(run))[0]
        assert (record["terms"]["full"] > 1e-4) == teaches and (record["cosine"] < 0.999) == teaches
        if not teaches:
            assert abs(record["terms"]["full"]) < 1e-6 and record["cosine"] > 1 - 1e-6


def test_response_tokens_are_matched_by_index(tmp_path: Path, values: Values) -> None:
    """The step's KL is the plain formula's on transformers: the teacher after its own prompt, the student after the other,
    token by token of the same response. In a layout of unequal grids too."""
    run = self_run(values, tmp_path)
    run = {**changed(run, run={"steps": 1, "export": False}), "distill": {"mode": "none"}}
    checked = preflight(parse_config(run, "test"), 1, starts_run=False)
    prompt = checked.prompts[3]
    assert checked.tokenizer.decode(prompt.teacher_ids).count("the answer is 9") == 1 and prompt.text == "say 3"
    for layout in ({}, {"teacher": {"ranks": "0-0"}, "student": {"ranks": "1-2", "tp": 2, "sp": True}}):
        folder = tmp_path / f"run{len(layout)}"
        record = train_records(train_run(with_layout(changed(run, run={"dir": str(folder)}), **layout)))[0]
        assert record["terms"]["full"] == pytest.approx(expected_kl(run, folder), rel=1e-5)


def expected_kl(run: Values, folder: Path) -> float:
    """Of the first step's rollouts, which `oprd rollout` writes."""
    from oprd_megatron.rollout.record import record_rollouts

    config = parse_config(run, "test")
    out = folder / "rollouts.jsonl"
    record_rollouts(config, config.student.path, out, steps=1)
    theirs = {p.token_ids: p.teacher_ids for p in preflight(config, 1, starts_run=False).prompts}
    model = AutoModelForCausalLM.from_pretrained(config.student.path, dtype=torch.float32)
    total, count = 0.0, 0
    for line in map(json.loads, out.read_text().splitlines()):
        ids, length = line["response_ids"], len(line["response_ids"])
        if not length:
            continue
        prompts = theirs[tuple(line["prompt_ids"])], tuple(line["prompt_ids"])
        with torch.no_grad():
            log_q, log_p = (
                model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for prompt in prompts
            )
        total, count = total + float((log_p.exp() * (log_p - log_q)).sum()), count + length
    return total / count


def test_an_averaged_teacher_follows(tmp_path: Path, values: Values) -> None:
    """With decay 0 the teacher of each step is the student before it: without privileged text there is never anything to learn.
    With decay 1 - tiny it is the frozen copy, to rounding."""
    follows = changed(self_run(values, tmp_path, None, ema_decay=0.0), run={"dir": str(tmp_path / "follows")})
    assert all(abs(record["terms"]["full"]) < 1e-6 for record in train_records(train_run(follows)))
    runs = {}
    for name, teacher in (("frozen", {}), ("slow", {"ema_decay": 0.9999999}), ("fast", {"ema_decay": 0.5})):
        run = changed(self_run(values, tmp_path, **teacher), run={"dir": str(tmp_path / name)}, optimizer={"lr": 3e-3})
        runs[name] = [record["terms"]["full"] for record in train_records(train_run(run))]
    assert runs["slow"] == pytest.approx(runs["frozen"], rel=1e-4)
    assert runs["fast"][0] == runs["frozen"][0] and abs(runs["fast"][2] / runs["frozen"][2] - 1) > 1e-3


@pytest.mark.parametrize(("dtype", "layout"), [("fp32", {"tp": 2}), ("bf16", {"pp": 2})], ids=str)
def test_an_averaged_teacher_resumes(tmp_path: Path, values: Values, dtype: str, layout: dict[str, int]) -> None:
    """Three and three steps are six, bit for bit: the average is in the checkpoint, in fp32 also under a bf16 teacher."""
    run = changed(self_run(values, tmp_path, ema_decay=0.7), optimizer={"lr": 3e-3}, teacher={"dtype": dtype})
    run = {**changed(run, student={"dtype": dtype}), "eval": None}
    whole = student_tensors(in_one_part(run, layout, tmp_path / "whole"))
    parts = student_tensors(in_two_parts(run, layout, layout, tmp_path / "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_an_averaged_teacher_in_other_layouts(tmp_path: Path, values: Values) -> None:
    """To 1e-5 the students of other layouts are those of one process."""
    run = {**changed(self_run(values, tmp_path, ema_decay=0.7), optimizer={"lr": 1e-3}), "eval": None}
    single = in_one_part(run, {}, tmp_path / "single")
    assert_close(in_one_part(run, {"pp": 2}, tmp_path / "pp"), single)
    assert_close(in_one_part(changed(run, optimizer={"distributed": True}), {"dp": 2}, tmp_path / "dp"), single)


def test_what_is_refused(tmp_path: Path, values: Values) -> None:
    """Other architectures or layouts for an average, a template without the prompt or with a field that is not there: one line
    before models load."""
    other = changed(values, teacher={"ema_decay": 0.5})
    assert "teacher.ema_decay: the teacher is to be an average of the student" in refusal(other, tmp_path)
    unequal = with_layout(self_run(values, tmp_path, ema_decay=0.5), {"tp": 2}, {"pp": 2})
    assert "need the same layout" in refusal(unequal, tmp_path, world_size=2)
    run = self_run(values, tmp_path, "{prompt} {solution}")
    assert "no field 'solution'" in refusal(run, tmp_path)
    run = self_run(values, tmp_path, "{prompt} {answer[x]}")
    with pytest.raises(DataError, match=r"train\.jsonl:1: teacher_template cannot be filled in"):
        preflight(parse_config(run, "test"), 1, starts_run=False)
