"""Several teachers in one run: routed by source or by sample, or averaged; on grids of their own; taking turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from oprd_megatron.bridge.health import Health
from oprd_megatron.bridge.stage1 import fit
from oprd_megatron.config import dump_config, load_config, parse_config
from oprd_megatron.diagnosis import diagnose
from oprd_megatron.errors import ConfigError, TeacherWeightsError
from oprd_megatron.evaluation.comparison import eval_table
from oprd_megatron.launching.ranks import default_num_ranks
from oprd_megatron.models.residence import Residence, checksum
from oprd_megatron.optimizer import stream_gradients
from oprd_megatron.placing import build_all
from oprd_megatron.planning import plan_run
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.trainer import Trainer
from oprd_megatron.watch import bridge_warnings
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, student_tensors, train_on_rank, train_records
from tests.training.test_bad_input import refusal
from tests.training.test_bridge_run import with_bridge

Values = dict[str, Any]
TERM = {"kind": "full", "weight": 0.5}
RELATIVE = 1e-5
"""fp32, against transformers."""


def several(values: Values, by: str = "source", **teaching: Any) -> Values:
    """The tiny run with two teachers, of five and of three layers; every third row is the first one's."""
    folder = Path(values["teacher"]["path"]).parent
    tiny_hf_model("llama", folder / "other", num_layers=3, seed=7, std=0.1)
    for name, first in (("train", 0), ("held_out", 50)):
        rows = [
            {"prompt": f"say {n}", "data_source": "dapo" if n % 3 == 0 else "code"} for n in range(first, first + 12)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    teachers = [
        {"name": "math", "path": str(folder / "teacher"), "dtype": "fp32"},
        {"name": "code", "path": str(folder / "other"), "dtype": "fp32", "distill": {"layers": [2, 4]}},
    ]
    if by == "source":
        teaching = {"to": {"dapo": "math"}, **teaching}
    run = {key: section for key, section in values.items() if key != "teacher"}
    return {
        **changed(run, optimizer={"clip_grad": 0.0, "warmup_fraction": 0.0}),
        "teachers": teachers,
        "teaching": {"by": by, **teaching},
        "output": {"terms": [TERM]},
        "distill": {"coefficient": 3.0},
    }


def with_teachers(values: Values, *updates: Values) -> Values:
    """A copy with some keys of the teachers set, in their order."""
    return {**values, "teachers": [{**old, **new} for old, new in zip(values["teachers"], updates, strict=True)]}


def train_run(values: Values) -> Path:
    run_ranks(default_num_ranks(parse_config(values, "test")), train_on_rank, values)
    return Path(values["run"]["dir"])


def first_step(values: Values) -> dict[str, Any]:
    """On a rank: the record of a run's first step, its gradients, and each lesson's samples."""
    platform, checked = select_platform("cpu"), None
    config = parse_config(values, "test")
    checked = preflight(config, default_num_ranks(config), starts_run=False)
    trainer = Trainer(checked, *build_all(checked, platform), platform)
    trainer.sync(0)
    rollouts = trainer.text.rollouts(0)
    samples = {
        lesson.name: [(s.prompt_ids, s.response_ids) for s in lesson.of_rollouts(rollouts)]
        for lesson in trainer.lessons
    }
    record = trainer.step(0)
    gradients = {}
    if trainer.student.grid.is_member:
        gradients = {name: tensor.clone() for name, tensor in stream_gradients(trainer.student)}
    return {"record": record, "gradients": gradients, "samples": samples}


def first_steps(runs: list[Values]) -> list[dict[str, Any]]:
    return [first_step(values) for values in runs]


def by_hand(values: Values, samples: dict[str, list[Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a routed step through transformers: sums over all tokens, divided by their number."""
    config = parse_config(values, "test")
    student = AutoModelForCausalLM.from_pretrained(config.student.path, dtype=torch.float32)
    tokens = sum(len(response) for some in samples.values() for _, response in some)
    total = torch.zeros(())
    for name, some in samples.items():
        view = config.of_teacher(name)
        teacher = AutoModelForCausalLM.from_pretrained(view.teacher.path, dtype=torch.float32)
        pairs = {"math": [(1, 1), (2, 2), (3, 4), (4, 5)], "code": [(2, 2), (4, 3)]}[name]
        for prompt, response in some:
            ids, first = torch.tensor([[*prompt, *response]]), len(prompt)
            with torch.no_grad():
                taught = teacher(ids, output_hidden_states=True)
            found = student(ids, output_hidden_states=True)
            for here, there in pairs:
                gap = found.hidden_states[here][0, first:] - taught.hidden_states[there][0, first:]
                total = total + 3.0 / len(pairs) * gap.square().mean(-1).sum() / tokens
            log_p, log_q = (out.logits[0, first - 1 : -1].log_softmax(-1) for out in (found, taught))
            total = total + 0.5 * (log_p.exp() * (log_p - log_q)).sum() / tokens
    total.backward()
    return float(total), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


APART = ({"parallel": {"tp": 2, "ranks": "0-1"}}, {"parallel": {"ranks": "2-2"}}, {"pp": 2, "ranks": "0-1"})
"""The first teacher on the student's ranks, in another layout; the second on one of its own."""


@pytest.mark.parametrize(
    ("layout", "anew"), [("single", {}), ("apart", {}), ("apart", {"micro_batch_tokens": 60})], ids=str
)
def test_routed_is_the_plain_sum(tmp_path: Path, values: Values, layout: str, anew: Values) -> None:
    """Loss, gradient norm and every gradient of a step are those of one sum over all samples, whatever the grids; each
    teacher teaches its own rows, and shares need not be multiples of the micro-batch."""
    run = changed(several(values), run={**anew, "seed": 7}, rollout={"prompts_per_step": 6, "responses_per_prompt": 1})
    if layout == "apart":
        run = {**with_teachers(run, *APART[:2]), "student": {**run["student"], "parallel": APART[2]}}
    ranks = run_ranks(default_num_ranks(parse_config(run, "test")), first_step, run)
    found = ranks[0]
    record, samples = found["record"], found["samples"]
    assert all(rank["record"]["loss"] == record["loss"] for rank in ranks)
    assert sorted(map(len, samples.values())) == sorted(t["samples"] for t in record["teachers"].values())
    assert sum(map(len, samples.values())) == 6 and len(samples["math"]) % 2 == 1
    loss, gradients = by_hand(run, samples)
    assert record["loss"] == pytest.approx(loss, rel=RELATIVE)
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    assert record["grad_norm"] == pytest.approx(norm, rel=RELATIVE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * norm)
    tokens = {name: sum(len(response) for _, response in some) for name, some in samples.items()}
    entries = record["teachers"]
    assert {name: entry["supervised_tokens"] for name, entry in entries.items()} == tokens
    for key in ("loss", "cosine"):
        means = sum(entries[name][key] * count for name, count in tokens.items()) / sum(tokens.values())
        assert record[key] == pytest.approx(means, rel=1e-6), key
    assert entries["code"]["layers"]["student"] == [2, 4] and entries["code"]["layers"]["teacher"] == [2, 3]
    assert record["supervised_tokens"] == sum(tokens.values())


def test_averaged(tmp_path: Path, values: Values) -> None:
    """The same teacher twice, with any weights, is that teacher alone; two teachers weigh 1 to 3. `teacher=NAME` is the run of
    one alone. Teachers that take turns change nothing, and a swap is timed."""
    run = several(values, "average")
    run["teachers"][1]["distill"] = {}
    run = changed(run, logging={"gradient_norms_every": 1})
    math, code = ({**run, "teacher": name} for name in ("math", "code"))
    twin = {"path": run["teachers"][0]["path"], "weight": 3.0}
    twins, both = with_teachers(run, {}, twin), with_teachers(run, {}, {"weight": 3.0})
    swapped = {**both, "teaching": {"by": "average", "host_budget": "1GiB"}}
    (steps,) = run_ranks(1, first_steps, [math, code, twins, both, swapped])
    one, other, double, mixed, moved = (step["record"] for step in steps)
    for key in ("loss", "grad_norm", "cosine"):
        assert double[key] == pytest.approx(one[key], rel=1e-6), key
    assert (
        double["gradient_norms"] == pytest.approx(one["gradient_norms"], rel=1e-6) and len(one["gradient_norms"]) == 2
    )
    assert double["terms"]["full"] == pytest.approx(one["terms"]["full"], rel=1e-6) and "teachers" not in one
    assert double["supervised_tokens"] == one["supervised_tokens"]
    assert mixed["loss"] == pytest.approx(0.25 * one["loss"] + 0.75 * other["loss"], rel=1e-6)
    for name, gradient in steps[3]["gradients"].items():
        mean = 0.25 * steps[0]["gradients"][name] + 0.75 * steps[1]["gradients"][name]
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)
        assert torch.equal(gradient, steps[4]["gradients"][name]), name
    assert moved["loss"] == mixed["loss"] and "swap" in moved["seconds"] and "swap" not in mixed["seconds"]


def test_a_run_in_two_parts_taking_turns(tmp_path: Path, values: Values) -> None:
    """Three and three steps, with teachers that wait in host memory, are six with both on the device, bit for bit: weights,
    losses and evaluations. Report, table and records know every teacher; a teacher without samples in a step says so."""
    run = changed(several(values), rollout={"prompts_per_step": 1}, run={"steps": 6})
    whole = train_run(changed(run, run={"dir": str(tmp_path / "whole")}, logging={"tensorboard": True}))
    turns = changed(run, run={"dir": str(tmp_path / "parts")}, teaching={"host_budget": "1MiB"})
    parts = train_run(changed(turns, run={"stop_at": 3}))
    train_run(turns)
    for name, tensor in student_tensors(whole).items():
        assert torch.equal(student_tensors(parts)[name], tensor), name
    records, again = (train_records(folder) for folder in (whole, parts))
    assert [(r["step"], r["loss"], r["grad_norm"], r["teachers"]) for r in records] == [
        (r["step"], r["loss"], r["grad_norm"], r["teachers"]) for r in again
    ]
    for record in records:
        ((name, entry),) = [item for item in record["teachers"].items() if item[1]["samples"]]
        assert entry["samples"] == 2 and entry["loss"] == pytest.approx(record["loss"], rel=1e-9)
        assert all(item == {"samples": 0} for other, item in record["teachers"].items() if other != name)
    assert {name for r in records for name, entry in r["teachers"].items() if entry["samples"]} == {"math", "code"}
    evals, others = (train_records(folder, "eval") for folder in (whole, parts))
    assert [(e["step"], e["kl"], e["cosine"]) for e in evals] == [(e["step"], e["kl"], e["cosine"]) for e in others]
    last = evals[-1]
    tokens = {name: entry["tokens"] for name, entry in last["teachers"].items()}
    assert list(tokens) == ["math", "code"] and last["tokens"] == sum(tokens.values())
    for key in ("kl", "cross_entropy", "cosine"):
        mean = sum(last["teachers"][name][key] * count for name, count in tokens.items()) / last["tokens"]
        assert last[key] == pytest.approx(mean, rel=1e-9)
    assert {sample["taught_by"]: sample["prompt"] for sample in reversed(last["samples"])} == {
        "math": "say 51",
        "code": "say 50",
    }
    page = (whole / "report.html").read_text()
    assert all(f"Cosine per layer, teacher {name}" in page for name in tokens)
    assert "student <- teacher code" in eval_table(last)
    assert load_config(whole / "config.yaml") == parse_config(
        changed(run, run={"dir": str(tmp_path / "whole")}, logging={"tensorboard": True}), "test"
    )
    moved = with_teachers(changed(run, run={"dir": str(whole)}), {}, {"path": run["teachers"][0]["path"]})
    assert "holds a run with another teachers" in refusal(moved, tmp_path)


def test_a_bridge_of_its_own(tmp_path: Path, values: Values) -> None:
    """A wider teacher through its bridge beside one without, each on a rank of its own, resumed; the bridge is watched by the
    teacher's name."""
    tiny_hf_model("llama", tmp_path / "teacher", num_layers=5, hidden_size=48, seed=1, std=0.1)
    bridge = with_bridge(values, tmp_path)["distill"]["bridge"]
    run = with_teachers(several(values), {"parallel": {"ranks": "1-1"}, "distill": {"bridge": bridge}}, {})
    run = {**teachers_with(run, parallel={"ranks": "2-2"}), "student": {**run["student"], "parallel": {"ranks": "0-0"}}}
    run = {**changed(run, run={"steps": 2}, eval={"every": 1}), "bridge": {"warn_drop": 0.0}}
    train_run(changed(run, run={"stop_at": 1}))
    folder = train_run(run)
    assert [record["step"] for record in train_records(folder)] == [1, 2]
    evals = train_records(folder, "eval")
    assert [record["step"] for record in evals] == [0, 1, 2]
    for record in evals:
        assert len(record["teachers"]["math"]["layers"]["inside"]) == 4
        assert "inside" not in record["teachers"]["code"]["layers"]
    health = {"math": Health(0.0)}
    fallen = {**evals[0]["teachers"]["math"]}
    fallen["layers"] = {**fallen["layers"], "cosine": [-1.0] * 4}
    assert bridge_warnings(health, evals[0]) == []
    (*_, line) = bridge_warnings(health, {**evals[0], "step": 9, "teachers": {**evals[0]["teachers"], "math": fallen}})
    assert line.startswith("teacher math: step 9: student layer 4: held-out cosine through the bridge fell to -1.000")


def leave_and_return(values: Values) -> dict[str, Any]:
    config = parse_config(values, "test")
    platform, checked = select_platform("cpu"), preflight(config, 1, starts_run=False)
    teachers, _ = build_all(checked, platform)
    model = teachers[0].model
    before = {name: p.detach().clone() for name, p in model.chunks[0].named_parameters()}
    residence = Residence(model, "math")
    residence.leave()
    gone = sum(p.numel() for p in model.chunks[0].parameters())
    residence.come_back()
    same = all(torch.equal(p, before[name]) for name, p in model.chunks[0].named_parameters())
    places = {p.data_ptr() for p in model.chunks[0].parameters()}
    residence.leave()
    residence.luggage[3].host[5] ^= 1
    with pytest.raises(TeacherWeightsError) as caught:
        residence.come_back()
    sizes = sum(p.numel() * 4 for p in before.values())
    host = sum(item.host.numel() for item in residence.luggage)
    return {
        "gone": gone, "same": same, "host": host - sizes, "name": residence.luggage[3].name,
        "says": str(caught.value), "places": len(places) - len(before),
    }  # fmt: skip


def test_a_corrupted_copy_is_caught(tmp_path: Path, values: Values) -> None:
    """Weights leave and return bit for bit, tied ones once; a single changed bit of the host copy is an error that names
    teacher and tensor."""
    (found,) = run_ranks(1, leave_and_return, several(values))
    assert found["gone"] == 0 and found["same"] and found["host"] == 0 and found["places"] == 0
    assert f"teacher math: {found['name']} came back" in found["says"] and "\n" not in found["says"]


def test_checksum() -> None:
    """Every changed bit changes it, and so do words that change places, also in the bytes after the last whole word."""
    data = torch.arange(1, 24, dtype=torch.uint8)
    sums = {checksum(data)}
    for place in range(len(data)):
        for bit in range(8):
            other = data.clone()
            other[place] ^= 1 << bit
            sums.add(checksum(other))
    assert len(sums) == 1 + 23 * 8
    swapped = torch.cat([data[4:8], data[:4], data[8:]])
    assert checksum(swapped) not in sums


def teachers_with(run: Values, **second: Any) -> Values:
    return with_teachers(run, {}, second)


MISTAKES: list[tuple[Any, str]] = [
    (lambda r: teachers_with(r, name="math"), "teachers: two are called math"),
    (lambda r: changed(r, teaching={"to": {"dapo": "maths"}}), "teaching.to: dapo goes to 'maths', which is no teacher"),
    (lambda r: teachers_with(r, distill={"kk": 2}), "teachers[1].distill.kk: unknown key; did you mean 'k'?"),
    (lambda r: teachers_with(r, distill={"mode": "linear"}), "teachers[1].distill.mode: linear"),
    (lambda r: {**r, "bridge": {"refit_every": 2}}, "bridge.refit_every: works with one teacher only"),
    (lambda r: teachers_with(r, ema_decay=0.5), "teachers[1].ema_decay: unknown key"),
    (lambda r: {**r, "output": {}, "distill": {"cross_tokenizer": True}}, "teachers[0].distill.cross_tokenizer"),
    (lambda r: {**r, "teaching": None}, "teachers and teaching go together"),
    (lambda r: {**r, "teaching": {"by": "average", "to": {"a": "math"}}}, "teaching: to: is for by: source"),
    (lambda r: teachers_with(r, weight=2), "teachers[1].weight: is for teaching.by: average"),
    (lambda r: {**r, "teacher": {"path": "elsewhere"}}, "teacher: is not the first of `teachers`"),
    (lambda r: {**r, "teacher": {"dtype": "fp32"}}, "choose one of them with teacher=NAME"),
    (lambda r: {**r, "teacher": "mat"}, "teacher: no 'mat' among the run's teachers (math, code)"),
    (lambda r: {**r, "output": {}, "distill": {"mode": "none"}}, "teachers[0]: there is nothing to train on"),
    (
        lambda r: with_teachers({**r, "teaching": {"by": "average"}}, {"weight": 0}, {"weight": 0}),
        "teachers: their weights sum to 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_what_the_config_refuses(tmp_path: Path, values: Values, number: int) -> None:
    """One line that names the key."""
    mistake, says = MISTAKES[number]
    with pytest.raises(ConfigError) as caught:
        parse_config(mistake(several(values)), "test")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_preflight_refuses(tmp_path: Path, values: Values) -> None:
    """Prompts without a teacher, teachers without prompts, templates, ranks and budgets: one line before models load."""
    run = several(values)
    path = Path(run["rollout"]["prompts"]["path"])
    assert f"{path}:2: data_source 'code' goes to no teacher (there are math, web)" in refusal(
        teachers_with(run, name="web"), tmp_path
    )
    assert "no prompt goes to the teacher web" in refusal(
        {**teachers_with(run, name="web"), "teaching": {"by": "source", "to": {"dapo": "math", "code": "math"}}},
        tmp_path,
    )
    assert f"{path}:1: data_source 'dapo' goes to no teacher" in refusal(
        {**run, "teaching": {"by": "sample"}}, tmp_path
    )
    assert "no field 'origin'" in refusal(changed(run, teaching={"field": "origin"}), tmp_path)
    small = refusal(changed(run, teaching={"host_budget": "200KiB"}), tmp_path)
    assert "teaching.host_budget: 204800 is below the" in small and "on rank 0" in small
    idle = with_teachers(run, {"parallel": {"ranks": "0-0"}}, {"parallel": {"ranks": "0-0"}})
    idle = {**idle, "student": {**run["student"], "parallel": {"ranks": "0-0"}}}
    assert "1 of 2 ranks have no model (the first is 1; teacher math on 0-0" in refusal(idle, tmp_path, world_size=2)
    part = {
        **teachers_with(run, parallel={"ranks": "1-2"}),
        "student": {**run["student"], "parallel": {"ranks": "0-1"}},
    }
    part = with_teachers(part, {"parallel": {"ranks": "0-1"}}, {})
    assert "teachers[1] (code): teacher.parallel.ranks 1-2 and student.parallel.ranks 0-1 overlap" in refusal(
        part, tmp_path, world_size=3
    )
    wide = refusal(teachers_with(run, distill={"layers": [5]}), tmp_path)
    assert wide.startswith("teachers[1] (code): distill.layers: student layer 5 is out of range")
    templated = changed(run)
    templated["rollout"]["prompts"] = {**run["rollout"]["prompts"], "teacher_template": "{prompt}"}
    with pytest.raises(ConfigError, match=r"rollout.prompts.teacher_template: works with one teacher only"):
        parse_config(templated, "test")


def test_commands_that_look_at_one_teacher(tmp_path: Path, values: Values) -> None:
    """They say how to choose one; `teacher=NAME` does."""
    run = several(values)
    config = parse_config(run, "test")
    for command in (
        lambda: plan_run(config, 1),
        lambda: diagnose(config),
        lambda: fit(config, tmp_path / "bridge.safetensors"),
    ):
        with pytest.raises(ConfigError, match="the config names math, code; choose one with teacher=math"):
            command()
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    one = load_config(file, ["teacher=code"])
    assert one == config.of_teacher("code") and one.distill.layers == [2, 4] and one.distill.coefficient == 3.0
    assert [pair.teacher_layer for pair in plan_run(one, 1).pairs] == [2, 3]
    assert default_num_ranks(parse_config(teachers_with(run, parallel={"ranks": "2-4"}), "test")) == 5


def test_routed_by_sample(values: Values) -> None:
    """The field is the teacher's name; prompts keep it, and views have their own. Only ids that all know are written."""
    run = several(values)
    path = Path(run["rollout"]["prompts"]["path"])
    tiny_hf_model("llama", run["teachers"][1]["path"], num_layers=3, vocab_size=270, std=0.1)
    path.write_text(
        "".join(json.dumps({"prompt": f"say {n}", "by": "code" if n % 2 else "math"}) + "\n" for n in range(6))
    )
    checked = preflight(
        parse_config({**run, "eval": None, "teaching": {"by": "sample", "field": "by"}}, "test"), 1, starts_run=False
    )
    assert checked.student_vocab_size == 270 and checked.padded_vocab_size == 288
    assert [prompt.source for prompt in checked.prompts] == ["math", "code"] * 3
    assert [prompt.index for prompt in checked.lessons["code"].prompts] == [1, 3, 5]
