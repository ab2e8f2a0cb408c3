"""Output-space terms in whole runs: alone, beside the representation loss, after a bridge run, and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oprd_megatron.config import parse_config
from oprd_megatron.errors import ConfigError
from tests.cross_tokenizer.cross_runs import cross_run
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout
from tests.training.test_bad_input import refusal
from tests.training.test_bridge_run import wide_run, with_bridge
from tests.training.test_resume import assert_close, in_one_part, in_two_parts

Values = dict[str, Any]
HEAD = "lm_head.weight"
FULL: Values = {"kind": "full"}
DRAWN: Values = {"kind": "sampled", "name": "drawn"}
THEIRS: Values = {"kind": "topk", "k": 4, "support": "teacher", "positions": "last_k", "first_or_last": 3}


def output_run(values: Values, folder: Path, *terms: Values, steps: int = 3, **distill: Any) -> Values:
    """The run with these terms, in a directory of its own."""
    run = changed(values, run={"dir": str(folder), "steps": steps}, optimizer={"lr": 3e-3, "warmup_fraction": 0.0})
    return {**run, "distill": distill, "output": {"terms": list(terms), "chunk_tokens": 7}}


def with_heads(values: Values) -> Values:
    """The models again with heads of their own; the teacher has more ids than the student."""
    for name, layers, vocab, seed in (("teacher", 5, 400, 1), ("student", 4, 288, 2)):
        tiny_hf_model(
            "llama", values[name]["path"], num_layers=layers, vocab_size=vocab, std=0.1, seed=seed, tied=False
        )
    return values


def test_a_term_alone(tmp_path: Path, values: Values) -> None:
    """With coefficient 0 the loss is the weighted term alone, states are still measured, and the held-out KL falls. An untied
    head is trained; the representation loss alone leaves it as it was."""
    values = with_heads(values)
    before = load_file(tmp_path / "student" / "model.safetensors")
    run = train_run(output_run(values, tmp_path / "opd", {**FULL, "weight": 2.0}, steps=4, coefficient=0.0))
    records, evals = train_records(run), train_records(run, "eval")
    for record in records:
        assert record["loss"] == pytest.approx(2.0 * record["terms"]["full"], rel=1e-12) and record["loss"] > 0
        assert record["weights"] == {"oprd": 0.0, "full": 2.0} and "gradient_norms" not in record
        assert all(mse > 0 for mse in record["layers"]["mse"])
    assert evals[-1]["kl"] < evals[0]["kl"] and records[-1]["terms"]["full"] < records[0]["terms"]["full"]
    assert not torch.equal(student_tensors(run)[HEAD], before[HEAD])
    plain = train_run({**output_run(values, tmp_path / "plain"), "eval": None})
    assert torch.equal(student_tensors(plain)[HEAD], before[HEAD])
    assert all({"terms", "weights"}.isdisjoint(record) for record in train_records(plain))


def test_terms_add_up_and_can_be_told_apart(tmp_path: Path, values: Values) -> None:
    """Eq. 7: the loss of a step is the sum of the terms' and OPRD's, each as it is alone on the same student. The gradient norm
    that is measured of each is that of a run with it alone, and to measure it changes no bit of the update."""
    full, drawn = {**FULL, "weight": 0.5}, {**DRAWN, "weight": [[0.0, 2.0], [1.0, 0.0]]}
    runs = {
        "both": output_run(values, tmp_path / "both", full, drawn, steps=2, coefficient=3.0),
        "measured": output_run(values, tmp_path / "measured", full, drawn, steps=2, coefficient=3.0),
        "full": output_run(values, tmp_path / "full", full, steps=1, coefficient=0.0),
        "drawn": output_run(values, tmp_path / "drawn", drawn, steps=1, coefficient=0.0),
        "oprd": output_run(values, tmp_path / "oprd", steps=1, coefficient=3.0),
    }
    runs["measured"] = changed(runs["measured"], logging={"gradient_norms_every": 2})
    folders = {name: train_run({**run, "eval": None}) for name, run in runs.items()}
    first = {name: train_records(folder)[0] for name, folder in folders.items()}
    both = first["both"]
    assert both["weights"] == {"oprd": 3.0, "full": 0.5, "drawn": 2.0}
    assert both["loss"] == pytest.approx(sum(first[name]["loss"] for name in ("full", "drawn", "oprd")), rel=1e-9)
    assert both["terms"] == {**first["full"]["terms"], **first["drawn"]["terms"]}
    assert both["layers"]["mse"] == first["oprd"]["layers"]["mse"]
    norms = first["measured"]["gradient_norms"]
    assert list(norms) == ["oprd", "full", "drawn"]
    for name, norm in norms.items():
        assert norm == pytest.approx(first[name]["grad_norm"], rel=1e-6) and norm > 0
    records = [train_records(folders[name]) for name in ("both", "measured")]
    assert "gradient_norms" not in records[1][1] and records[1][1]["weights"]["drawn"] == 0.0
    for one, other in zip(*records, strict=True):
        assert (one["loss"], one["grad_norm"], one["terms"]) == (other["loss"], other["grad_norm"], other["terms"])
    for name, tensor in student_tensors(folders["both"]).items():
        assert torch.equal(student_tensors(folders["measured"])[name], tensor), name


def test_terms_resume_and_equal_other_layouts(tmp_path: Path, values: Values) -> None:
    """Three and three steps are six, bit for bit, with trained heads under the distributed optimizer and weights that move; and
    to 1e-5 the students of unequal layouts, in chunks, recomputed and packed, and of models on ranks of their own with a
    budget, are those of one process."""
    values = changed(with_heads(values), optimizer={"distributed": True})
    terms = [FULL, {**DRAWN, "weight": [[0.0, 0.0], [0.5, 0.3]]}, {**THEIRS, "support": "union", "rest": "tail"}]
    values = {**values, "distill": {"coefficient": [[0, 1], [1, 0]]}, "output": {"terms": terms}, "eval": None}
    whole = in_one_part(values, {"dp": 2}, tmp_path / "whole")
    parts = in_two_parts(values, {"dp": 2}, {"dp": 2}, tmp_path / "parts")
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(student_tensors(parts)[name], tensor), name
    keys = ("step", "loss", "terms", "weights")
    records = [[[record[key] for key in keys] for record in train_records(run)] for run in (whole, parts)]
    assert records[0] == records[1] and [step[3]["drawn"] for step in records[0]] == pytest.approx(
        [0, 0.12, 0.24, 0.3, 0.3, 0.3]
    )
    assert_close(in_one_part(values, {}, tmp_path / "single"), whole)
    values = changed(values, distill={"spool_bytes": "16KiB"})
    unequal = changed(values, run={"micro_batch_tokens": 60}, student={"recompute": {"granularity": "full"}})
    layout = {"teacher": {"pp": 2}, "student": {"tp": 2, "sp": True}}
    assert_close(in_one_part(unequal, layout, tmp_path / "unequal"), whole)
    layout = {"teacher": {"ranks": "0-0"}, "student": {"tp": 2, "ranks": "1-2"}}
    assert_close(in_one_part(values, layout, tmp_path / "apart"), whole)
    for name in ("unequal", "apart"):
        assert max(record["chunks"] for record in train_records(tmp_path / name)) > 1


def test_without_states(tmp_path: Path, values: Values) -> None:
    """mode: none: what travels between the models' own ranks are the numbers that the terms read of each token, or its final
    state, and nothing else; training measures no states, evaluation does where widths are equal; and the student is the same
    wherever the teacher's head is."""
    values, runs = with_heads(values), {}
    for head in ("auto", "student"):
        run = output_run(values, tmp_path / head, DRAWN, {**THEIRS, "k": 2}, steps=2, mode="none")
        runs[head] = train_run(
            with_layout(changed(run, output={"teacher_head": head}), {"ranks": "0-0"}, {"ranks": "1-1"})
        )
        for record in train_records(runs[head]):
            assert "layers" not in record and record["cosine"] is None
            tokens = record["response_length"]["mean"] * 8
            assert record["exchanged_bytes"] == tokens * 4 * {"auto": 1 + 2 * 2, "student": 32}[head]
            assert record["weights"] == {"drawn": 1.0, "topk": 1.0}
            assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-12)
        evals = train_records(runs[head], "eval")
        assert len(evals[0]["layers"]["cosine"]) == 4 and evals[-1]["kl"] != evals[0]["kl"]
    assert_close(*runs.values())


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}], ids=str)
def test_two_stages(tmp_path: Path, layout: dict[str, Any]) -> None:
    """The paper's recipe: a bridge run, then OPD alone from the student that it exported, of another width than the teacher.
    The second run begins where the first one ended, and lowers KL. The bridge belongs to the first student and is refused."""
    values = changed(wide_run(tmp_path), optimizer={"lr": 3e-3})
    first = train_run(with_layout(with_bridge(values, tmp_path), **layout))
    second = changed(values, student={"path": str(first / "student_hf")})
    bridge = {"bridge": str(tmp_path / "bridge.safetensors")}
    assert "student" in refusal(output_run(second, tmp_path / "no", FULL, coefficient=0.0, **bridge), tmp_path)
    run = train_run(with_layout(output_run(second, tmp_path / "second", FULL, steps=4, mode="none"), **layout))
    ends, begins = train_records(first, "eval"), train_records(run, "eval")
    assert begins[0]["kl"] == pytest.approx(ends[-1]["kl"], rel=1e-4)
    assert begins[0]["cross_entropy"] == pytest.approx(ends[-1]["cross_entropy"], rel=1e-4)
    assert begins[-1]["kl"] < begins[0]["kl"]
    assert begins[0]["cosine"] is None and begins[0]["layers"]["student"] == []


def test_two_stages_in_one_run(tmp_path: Path) -> None:
    """`recipe: two_stage`: its first half is the bridge run, step by step; in the second half the output term alone counts."""
    values = changed(wide_run(tmp_path), run={"steps": 4}, optimizer={"lr": 3e-3})
    values = {**with_bridge(values, tmp_path), "eval": None}
    plain = changed(values, run={"dir": str(tmp_path / "plain")}, distill={"coefficient": 100.0})
    bridge = train_records(train_run(plain))
    records = train_records(train_run({**values, "recipe": "two_stage"}))
    assert [record["weights"] for record in records] == [{"oprd": 100.0, "full": 0.0}] * 2 + [
        {"oprd": 0.0, "full": 1.0}
    ] * 2
    for found, expected in zip(records[:2], bridge, strict=False):
        assert (found["loss"], found["grad_norm"]) == pytest.approx((expected["loss"], expected["grad_norm"]), rel=1e-6)
    for record in records[2:]:
        assert record["loss"] == pytest.approx(record["terms"]["full"], rel=1e-12) and record["layers"]["loss"][0] > 0


def test_where_terms_are_refused(tmp_path: Path, values: Values) -> None:
    """More tokens than both models have, and two vocabularies: one line before anything is written."""
    near = {"kind": "topk", "name": "near", "k": 289}
    error = refusal(output_run(with_heads(values), tmp_path / "run", FULL, near), tmp_path)
    assert "output.terms: near wants the top 289 of 288 ids" in error and "lower k" in error
    with pytest.raises(ConfigError) as caught:
        parse_config({**cross_run(tmp_path), "output": {"terms": [FULL]}}, "test")
    assert "full needs one vocabulary" in str(caught.value) and "\n" not in str(caught.value)
