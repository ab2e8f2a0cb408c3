"""OPD in whole runs: alone, beside the representation loss, after a bridge run, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oprd_megatron.config import parse_config
from oprd_megatron.errors import ConfigError
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, student_tensors, train_records, train_run, with_layout
from tests.training.test_bad_input import refusal
from tests.training.test_bridge_run import wide_run, with_bridge
from tests.training.test_resume import assert_close, in_one_part, in_two_parts

Values = dict[str, Any]
HEAD = "lm_head.weight"


def opd_run(values: Values, folder: Path, steps: int = 3, **distill: Any) -> Values:
    """The run with OPD, in a directory of its own."""
    run = changed(values, run={"dir": str(folder), "steps": steps}, optimizer={"lr": 3e-3, "warmup_fraction": 0.0})
    return {**run, "distill": {"opd_coefficient": 1.0, **distill}}


def with_heads(values: Values) -> Values:
    """The models again with heads of their own; the teacher has more ids than the student."""
    for name, layers, vocab, seed in (("teacher", 5, 400, 1), ("student", 4, 288, 2)):
        tiny_hf_model(
            "llama", values[name]["path"], num_layers=layers, vocab_size=vocab, std=0.1, seed=seed, tied=False
        )
    return values


def test_opd_alone(tmp_path: Path, values: Values) -> None:
    """With coefficient 0 the loss is the weighted KL alone, states are still measured, and the held-out KL falls. An untied
    head is trained; the representation loss alone leaves it as it was."""
    values = with_heads(values)
    before = load_file(tmp_path / "student" / "model.safetensors")
    run = train_run(opd_run(values, tmp_path / "opd", 4, opd_coefficient=2.0, coefficient=0.0))
    records, evals = train_records(run), train_records(run, "eval")
    for record in records:
        assert record["loss"] == pytest.approx(2.0 * record["reverse_kl"], rel=1e-12) and record["reverse_kl"] > 0
        assert all(mse > 0 for mse in record["layers"]["mse"])
    assert evals[-1]["kl"] < evals[0]["kl"] and records[-1]["reverse_kl"] < records[0]["reverse_kl"]
    assert not torch.equal(student_tensors(run)[HEAD], before[HEAD])
    plain = train_run({**opd_run(values, tmp_path / "plain"), "distill": {}})
    assert torch.equal(student_tensors(plain)[HEAD], before[HEAD])
    assert all("reverse_kl" not in record for record in train_records(plain))


def test_both_terms_add_up(tmp_path: Path, values: Values) -> None:
    """Eq. 7: the loss of a step is OPD's and OPRD's, each as it is alone on the same student."""
    both, alone, plain = (
        train_records(train_run({**opd_run(values, tmp_path / name, 1, **keys), "eval": None}))[0]
        for name, keys in (
            ("both", {"opd_coefficient": 0.5, "coefficient": 3.0}),
            ("alone", {"opd_coefficient": 0.5, "coefficient": 0.0}),
            ("plain", {"opd_coefficient": 0.0, "coefficient": 3.0}),
        )
    )
    assert both["loss"] == pytest.approx(alone["loss"] + plain["loss"], rel=1e-9)
    assert both["reverse_kl"] == alone["reverse_kl"] and both["layers"]["mse"] == plain["layers"]["mse"]


def test_opd_resumes_and_equals_other_layouts(tmp_path: Path, values: Values) -> None:
    """Three and three steps are six, bit for bit, with trained heads under the distributed optimizer; and to 1e-5 the students
    of unequal layouts, in chunks, recomputed and packed, are those of one process."""
    values = changed(with_heads(values), optimizer={"distributed": True})
    values = {**values, "distill": {"opd_coefficient": 1.0}, "eval": None}
    whole = in_one_part(values, {"dp": 2}, tmp_path / "whole")
    parts = in_two_parts(values, {"dp": 2}, {"dp": 2}, tmp_path / "parts")
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(student_tensors(parts)[name], tensor), name
    assert_close(in_one_part(values, {}, tmp_path / "single"), whole)
    unequal = changed(values, run={"micro_batch_tokens": 60}, student={"recompute": {"granularity": "full"}})
    unequal = changed(unequal, distill={"spool_bytes": "16KiB"})
    layout = {"teacher": {"pp": 2}, "student": {"tp": 2, "sp": True}}
    assert_close(in_one_part(unequal, layout, tmp_path / "unequal"), whole)
    assert max(record["chunks"] for record in train_records(tmp_path / "unequal")) > 1


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}], ids=str)
def test_two_stages(tmp_path: Path, layout: dict[str, Any]) -> None:
    """The paper's recipe: a bridge run, then OPD alone from the student that it exported, of another width than the teacher.
    The second run begins where the first one ended, and lowers KL. The bridge belongs to the first student and is refused."""
    values = changed(wide_run(tmp_path), optimizer={"lr": 3e-3})
    first = train_run(with_layout(with_bridge(values, tmp_path), **layout))
    second = changed(values, student={"path": str(first / "student_hf")})
    bridge = {"bridge": str(tmp_path / "bridge.safetensors")}
    assert "student" in refusal(opd_run(second, tmp_path / "no", coefficient=0.0, **bridge), tmp_path)
    run = train_run(with_layout(opd_run(second, tmp_path / "second", 4, coefficient=0.0, mode="linear"), **layout))
    ends, begins = train_records(first, "eval"), train_records(run, "eval")
    assert begins[0]["kl"] == pytest.approx(ends[-1]["kl"], rel=1e-4)
    assert begins[0]["cross_entropy"] == pytest.approx(ends[-1]["cross_entropy"], rel=1e-4)
    assert begins[-1]["kl"] < begins[0]["kl"]


def test_where_opd_is_refused(tmp_path: Path, values: Values) -> None:
    """On ranks of their own, and between vocabularies: one line before anything is written."""
    apart = with_layout(opd_run(values, tmp_path / "run"), {"ranks": "0-0"}, {"ranks": "1-1"})
    error = refusal(apart, tmp_path, world_size=2)
    assert "distill.opd_coefficient: OPD needs both models on the same ranks" in error
    assert "or set it to 0" in error
    refusal_of_config = {**values, "distill": {"opd_coefficient": 1.0, "cross_tokenizer": True}}
    with pytest.raises(ConfigError) as caught:
        parse_config(refusal_of_config, "test")
    assert "opd_coefficient needs one vocabulary" in str(caught.value) and "\n" not in str(caught.value)
