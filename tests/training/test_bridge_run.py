"""Runs through a bridge or trained maps: what they save, how they go on, and which bridges they refuse."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oprd_megatron.bridge.artefact import BridgeInfo, HeldOut, RankScore, info_file, write_bridge
from oprd_megatron.bridge.stage1 import fit
from oprd_megatron.config import parse_config
from oprd_megatron.errors import CheckpointError
from oprd_megatron.evaluate import evaluate
from oprd_megatron.placing import build_models
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import fingerprints, preflight
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.representation.space import LowRank
from oprd_megatron.rollout.tokenizer import load_tokenizer
from oprd_megatron.saving.checkpoint import latest_checkpoint
from oprd_megatron.saving.export import export_checkpoint
from oprd_megatron.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model, tiny_tokenizer
from tests.training.runs import changed, num_ranks, student_tensors, tiny_run, train_records, train_run, with_layout
from tests.training.test_bad_input import failing_run, files_below, refusal
from tests.training.test_resume import assert_close, in_one_part, in_two_parts

Values = dict[str, Any]
RANK, WIDTH, TEACHER_WIDTH = 4, 32, 48


def wide_run(folder: Path) -> Values:
    """`tiny_run` with a wider teacher."""
    values = tiny_run(folder)
    tiny_hf_model("llama", folder / "teacher", num_layers=5, hidden_size=TEACHER_WIDTH, seed=1, std=0.1)
    return values


def with_bridge(values: Values, folder: Path, is_mlp: bool = False, **distill: Any) -> Values:
    """The run with a bridge of random projections that was fitted, it says, for its models."""
    run = {**values, "distill": {**values.get("distill", {}), **distill}}
    config = parse_config({**run, "distill": {**run["distill"], "mode": "linear", "bridge_head": 0}}, "test")
    checked = preflight(config, num_ranks(run), starts_run=False)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    widths = checked.teacher.hidden_size, checked.student.hidden_size
    part = {"fc1.weight": (6, widths[1]), "fc1.bias": (6,), "fc2.weight": (RANK, 6), "fc2.bias": (RANK,)}
    shapes: dict[str, tuple[int, ...]] = part if is_mlp else {"projection": (RANK, widths[1])}
    bridge = Bridge(
        RANK,
        means={pair.teacher_layer: draw(widths[0]) for pair in checked.pairs},
        teacher={pair.teacher_layer: draw(RANK, widths[0]) for pair in checked.pairs},
        student={p.student_layer: {name: draw(*shape) for name, shape in shapes.items()} for p in checked.pairs},
    )
    each = [0.5] * len(checked.pairs)
    tokenizers = load_tokenizer(config.teacher.path), checked.tokenizer
    info = BridgeInfo(
        projector="mlp" if is_mlp else "linear",
        rank=RANK,
        layer_map=[(pair.student_layer, pair.teacher_layer) for pair in checked.pairs],
        fit={},
        held_out=HeldOut(cosine=each, explained_variance=each, inside=each),
        ranks={RANK: RankScore(cosine=0.5, explained_variance=0.5)},
        fingerprints=fingerprints(config, (checked.teacher, checked.student), tokenizers),
    )
    path = folder / "bridge.safetensors"
    write_bridge(path, bridge, info)
    return {**run, "distill": {**run["distill"], "bridge": str(path)}}


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The run's train and eval records without what depends on clock and machine."""
    timed = ("seconds", "tokens_per_second", "memory_mib", "stragglers", "samples")
    records = train_records(run_dir) + train_records(run_dir, "eval")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def maps_of(checkpoint: Path, teacher_width: int) -> list[torch.Tensor]:
    """The trained maps in a checkpoint, layer by layer, as torch itself reads them."""
    maps = {f"state_maps.{layer}.weight": torch.zeros(teacher_width, WIDTH) for layer in range(1, 5)}
    dcp.load(maps, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return list(maps.values())


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "distributed"), [({"tp": 2}, True), ({"pp": 2, "vpp": 2}, False)], ids=["tp2 distributed", "pp2 vpp2"]
)
def test_trained_maps_are_resumed(tmp_path: Path, layout: dict[str, int], distributed: bool) -> None:
    """mode linear: three and three steps are six, bit for bit in one layout, students, maps and all figures; and to 1e-5 where
    the second half has another layout. The maps have moved."""
    values = {**wide_run(tmp_path), "distill": {"mode": "linear"}}
    values = changed(values, optimizer={"distributed": distributed, "weight_decay": 0.1})
    whole = in_one_part(values, layout, tmp_path / "whole")
    parts = in_two_parts(values, layout, layout, tmp_path / "parts")
    assert_equal_tensors(student_tensors(parts), student_tensors(whole))
    assert figures(parts) == figures(whole)
    third, last, again = (
        maps_of(tmp_path / run / "checkpoints" / f"iter_{step:07d}", TEACHER_WIDTH)
        for run, step in (("parts", 3), ("whole", 6), ("parts", 6))
    )
    for before, after, resumed in zip(third, last, again, strict=True):
        assert torch.equal(after, resumed) and (after - before).abs().max() > 1e-4
    (tmp_path / "parts" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")
    crossed = train_run(with_layout(changed(values, run={"dir": str(tmp_path / "parts"), "steps": 6}), pp=2))
    assert_close(crossed, whole)
    for found, expected in zip(maps_of(crossed / "checkpoints" / "iter_0000006", TEACHER_WIDTH), last, strict=True):
        assert (found - expected).abs().max() <= 1e-5


def test_trained_maps_are_not_the_student_s(tmp_path: Path) -> None:
    """An exported student has no maps, whichever way it is exported, and transformers loads it whole."""
    values = changed({**wide_run(tmp_path), "distill": {"mode": "linear"}, "eval": None}, run={"steps": 1})
    run_dir = train_run(with_layout(values, tp=2))
    export_checkpoint(run_dir, tmp_path / "out")
    assert_equal_tensors(load_file(tmp_path / "out" / "model.safetensors"), student_tensors(run_dir))
    assert student_tensors(run_dir).keys() == load_file(tmp_path / "student" / "model.safetensors").keys()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]


REFITTING: Values = {"refit_every": 2}


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Values, Path, Path]:
    """(a run of six steps in two layouts that refits its bridge, its directory, its folder)."""
    folder = tmp_path_factory.mktemp("refitted")
    values = {**with_bridge(wide_run(folder), folder), "bridge": REFITTING}
    return values, in_one_part(values, {"dp": 2}, folder / "whole"), folder


def test_a_bridge_is_resumed_from_its_checkpoint(refitted: tuple[Values, Path, Path]) -> None:
    """Refitted at steps 3 and 5 and cut after 3: the second part goes on with the bridge of step 3, which only the checkpoint
    holds, to the bit. The teacher's half never changes."""
    values, whole, folder = refitted
    parts = in_two_parts(values, {"dp": 2}, {"dp": 2}, folder / "parts")
    assert_equal_tensors(student_tensors(parts), student_tensors(whole))
    assert figures(parts) == figures(whole)
    assert [record["step"] for record in train_records(whole) if "refitted" in record] == [3, 5]
    assert all(record["refitted"] is True for record in train_records(whole) if "refitted" in record)
    fitted = load_file(values["distill"]["bridge"])
    first, last, again = (
        load_file(run / "checkpoints" / f"iter_{step:07d}" / "bridge.safetensors")
        for run, step in ((parts, 3), (whole, 6), (parts, 6))
    )
    assert_equal_tensors(again, last)
    for name, tensor in fitted.items():
        assert first[name].shape == tensor.shape
        assert torch.equal(first[name], tensor) == torch.equal(last[name], tensor) == name.startswith("teacher"), name
        assert name.startswith("teacher") or not torch.equal(first[name], last[name]), name


def test_a_bridge_goes_on_in_another_layout(refitted: tuple[Values, Path, Path]) -> None:
    """Refits add the same moments up whatever the layout: to 1e-5, also on pipeline stages and disjoint ranks."""
    values, whole, folder = refitted
    assert_close(in_two_parts(values, {"tp": 2}, {"pp": 2}, folder / "crossed"), whole)


@pytest.mark.parametrize("distill", [{}, {"mode": "low_rank_residual", "bridge_head": 1}], ids=["low rank", "residual"])
def test_every_checkpoint_holds_the_bridge(tmp_path: Path, values: Values, distill: dict[str, Any]) -> None:
    """All of it, head and all, also one that is never refitted; a run without one has none. The student is exported without."""
    values = {**with_bridge(values, tmp_path, **distill), "checkpoint": {"every": 1}, "eval": None}
    run_dir = train_run(changed(values, run={"steps": 2}))
    for step in (1, 2):
        assert_equal_tensors(
            load_file(run_dir / "checkpoints" / f"iter_{step:07d}" / "bridge.safetensors"),
            load_file(tmp_path / "bridge.safetensors"),
        )
    assert {record["layers"]["inside"][0] > 0 for record in train_records(run_dir)} == {True}
    export_checkpoint(run_dir, tmp_path / "out")
    assert_equal_tensors(load_file(tmp_path / "out" / "model.safetensors"), student_tensors(run_dir))


def score(values: Values, out: Path, checkpoint: Path | None) -> None:
    evaluate(parse_config(values, "test"), out, checkpoint)


def scored(values: Values, out: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The record of `oprd eval`, on as many ranks as the layouts have."""
    run_ranks(num_ranks(values), score, values, out, checkpoint)
    record = json.loads(out.read_text())
    return {key: record[key] for key in ("kl", "cross_entropy", "layers")}


def test_eval_takes_the_checkpoint_s_bridge(refitted: tuple[Values, Path, Path]) -> None:
    """`oprd eval --weights RUN` measures what the run measured at its end, through the refitted bridge; the fitted one says
    something else about the same student."""
    values, whole, folder = refitted
    expected = train_records(whole, "eval")[-1]
    found = scored(with_layout(values, dp=2), folder / "eval.json", latest_checkpoint(whole))
    assert found["layers"] == expected["layers"] and found["kl"] == expected["kl"]
    copy = folder / "without_bridge"
    shutil.copytree(latest_checkpoint(whole), copy)  # type: ignore[arg-type]
    (copy / "bridge.safetensors").unlink()
    other = scored(with_layout(values, dp=2), folder / "other.json", copy)
    assert other["kl"] == expected["kl"]
    assert other["layers"]["cosine"] != expected["layers"]["cosine"]


def test_an_exported_student_is_scored_through_the_bridge(refitted: tuple[Values, Path, Path]) -> None:
    """`oprd eval --weights RUN/student_hf`: a student that was trained through a bridge may be measured through it, though its
    weights are no longer those that the bridge was fitted for; training from there is refused."""
    values, whole, folder = refitted
    exported = changed(values, student={"path": str(whole / "student_hf")})
    found = scored(exported, folder / "exported.json", None)
    assert found["kl"] == pytest.approx(train_records(whole, "eval")[-1]["kl"], rel=1e-5)
    with pytest.raises(CheckpointError, match="differs in its weights"):
        preflight(parse_config(changed(exported, run={"dir": str(folder / "new")}), "test"), 1)


def test_eval_takes_trained_maps(tmp_path: Path) -> None:
    """The same with trained maps, in another layout than the run's."""
    values = {**wide_run(tmp_path), "distill": {"mode": "linear"}}
    run_dir = train_run(values)
    expected = train_records(run_dir, "eval")[-1]
    found = scored(with_layout(values, tp=2), tmp_path / "eval.json", latest_checkpoint(run_dir))
    assert found["layers"]["cosine"] == pytest.approx(expected["layers"]["cosine"], abs=1e-5)
    untrained = scored(values, tmp_path / "before.json", None)
    assert untrained["layers"]["cosine"] != pytest.approx(expected["layers"]["cosine"], abs=1e-3)


def optimizer_tensors(trainer: Trainer) -> list[torch.Tensor]:
    """Adam's state and the student's parameters."""
    assert trainer.optimizer is not None
    inner = [part.optimizer for part in trainer.optimizer.optimizer.chained_optimizers]
    state = [v for part in inner for values in part.state.values() for v in values.values() if torch.is_tensor(v)]
    return [
        tensor.detach().clone() for tensor in [*state, *(p for c in trainer.student.chunks for p in c.parameters())]
    ]


def refit_once(values: Values) -> dict[str, Any]:
    """One step, then a refit on its own."""
    config, platform = parse_config(values, "test"), select_platform("cpu")
    checked = preflight(config, dist.get_world_size())
    trainer = Trainer(checked, *build_models(checked, platform), platform)
    trainer.sync(0)
    trainer.step(0)
    space = trainer.alignment.space
    assert isinstance(space, LowRank)
    before, old, rate = optimizer_tensors(trainer), space.whole, trainer.optimizer.scheduler.num_steps  # type: ignore[union-attr]
    samples = trainer.samples.of_student(trainer.text.rollouts(1))
    due = [trainer.refit(step, samples) for step in (0, 1)]
    kept = old is space.whole
    due.append(trainer.refit(2, samples))
    after = optimizer_tensors(trainer)
    plan = trainer.alignment.plan(samples)
    return {
        "due": due, "kept": kept, "equal": all(map(torch.equal, before, after)), "count": (len(before), len(after)),
        "rate": trainer.optimizer.scheduler.num_steps == rate,  # type: ignore[union-attr]
        "student": {k: v for k, v in space.whole.contiguous().items() if k.startswith("student")},
        "cosine": trainer.alignment.reduce(trainer.alignment.run(plan)).mean_cosine,
    }  # fmt: skip


def test_a_refit_touches_only_the_bridge(tmp_path: Path) -> None:
    """Not at the first step, only every other: then the student's half is another one and sees the teacher better, while Adam's
    moments, the schedule and the student are as they were. The same bridge on all ranks and in all layouts."""
    values = {**with_bridge(wide_run(tmp_path), tmp_path), "bridge": REFITTING, "eval": None}
    (single,) = run_ranks(1, refit_once, values)
    for rank in run_ranks(2, refit_once, with_layout(values, pp=2)):
        assert_close_tensors(rank["student"], single["student"])
        single_checks(rank)
    single_checks(single)


def single_checks(found: dict[str, Any]) -> None:
    assert found["due"] == [False, False, True] and found["kept"]
    assert found["equal"] and found["count"][0] == found["count"][1] > 0 and found["rate"]
    assert found["cosine"] > 0.5


def assert_close_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), name


def another_teacher(values: Values, folder: Path) -> Values:
    tiny_hf_model("llama", folder / "teacher", num_layers=5, std=0.1, seed=9)
    return values


def another_student(values: Values, folder: Path) -> Values:
    tiny_hf_model("llama", folder / "student", num_layers=4, std=0.1, seed=9)
    return values


def other_layers(values: Values, folder: Path) -> Values:
    return {**values, "distill": {**values["distill"], "layer_map": {1: 2, 2: 3}}}


def other_tokenizers(values: Values, folder: Path) -> Values:
    for name in ("teacher", "student"):
        tiny_tokenizer(folder / name, extra_tokens=("<extra>",))
    return values


def no_json(values: Values, folder: Path) -> Values:
    info_file(folder / "bridge.safetensors").unlink()
    return values


def torn(values: Values, folder: Path) -> Values:
    path = folder / "bridge.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return values


def gone(values: Values, folder: Path) -> Values:
    (folder / "bridge.safetensors").unlink()
    return values


def headless(values: Values, folder: Path) -> Values:
    return {**values, "distill": {**values["distill"], "mode": "low_rank_residual", "bridge_head": RANK}}


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (another_teacher, "teacher"),
        (another_student, "student"),
        (other_layers, "layer"),
        (other_tokenizers, "tokenizer"),
        (no_json, "bridge.json: missing"),
        (torn, "bridge.safetensors"),
        (gone, "bridge.safetensors"),
        (headless, "leaves nothing of a bridge of rank 4"),
    ],
)
def test_a_bridge_of_something_else(tmp_path: Path, values: Values, mistake: Any, says: str) -> None:
    """Refused in one line before anything is written."""
    values = with_bridge(values, tmp_path)
    preflight(parse_config(values, "test"), 1)
    error = refusal(mistake(values, tmp_path), tmp_path)
    assert says in error, error


def test_layer_weights_are_refused_before_anything_is_written(tmp_path: Path, values: Values) -> None:
    """A list of another length is found before a run directory is made."""
    values = {**values, "distill": {"layer_weights": [1, 2]}}
    before = files_below(tmp_path)
    (error,) = run_ranks(1, failing_run, values)
    assert "distill.layer_weights: 2 weights for 4 supervised layers" in error and "\n" not in error
    assert files_below(tmp_path) == before


def test_layer_weights_move_over_a_run(tmp_path: Path, values: Values) -> None:
    """The loss that a run writes down is the weighted mean of its layers' losses, with the weights of its step."""
    weights = {"layer_weights": [4, 0, 0, 0], "final_layer_weights": [0, 0, 0, 4], "coefficient": 3.0}
    values = {**changed(values, run={"steps": 3}), "distill": weights, "eval": None}
    for record in train_records(train_run(with_layout(values, pp=2))):
        progress, losses = (record["step"] - 1) / 2, record["layers"]["loss"]
        assert record["loss"] == pytest.approx(3.0 * ((1 - progress) * losses[0] + progress * losses[3]), rel=1e-9)


def test_a_mlp_run(tmp_path: Path) -> None:
    """An MLP's run trains and says nothing of what it sees; its checkpoint has all four parts, also after a refit."""
    values = {**with_bridge(wide_run(tmp_path), tmp_path, is_mlp=True), "eval": None}
    values["bridge"] = {"refit_every": 4, "epochs": 2, "mlp_width": 16}
    run_dir = train_run(changed(values, optimizer={"lr": 3e-3}, run={"steps": 5}))
    records = train_records(run_dir)
    assert records[3]["loss"] < records[0]["loss"] and records[4]["refitted"]
    assert all("inside" not in record and "inside" not in record["layers"] for record in records)
    held = load_file(latest_checkpoint(run_dir) / "bridge.safetensors")  # type: ignore[operator]
    assert {name.partition(".1.")[2] for name in held if name.startswith("student.1.")} == {
        "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias",
    }  # fmt: skip


def warned_run(values: Values) -> list[str]:
    """The warnings of a run on this rank."""
    from oprd_megatron.loop import train

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("oprd_megatron.watch").addHandler(handler)
    train(parse_config(values, "test"))
    return lines


def fitted_on_rank(values: Values, out: Path) -> None:
    fit(parse_config(values, "test"), out)


def test_a_run_warns_of_its_bridge(tmp_path: Path) -> None:
    """Steps that throw the student about make layers fall from what a fitted bridge sees; each layer that has fallen is told,
    measured from the first evaluation on."""
    values = {**wide_run(tmp_path), "bridge": {"rank": 4, "prompts": 12, "held_out": 0.25, "warn_drop": 0.05}}
    bridge = tmp_path / "bridge.safetensors"
    run_ranks(1, fitted_on_rank, values, bridge)
    values = {**values, "distill": {"bridge": str(bridge)}}
    values = changed(values, optimizer={"lr": 0.3, "warmup_fraction": 0.0, "clip_grad": 0.0}, eval={"every": 1})
    (lines,) = run_ranks(1, warned_run, values)
    evals = train_records(Path(values["run"]["dir"]), "eval")
    assert evals[0]["step"] == 0
    falls = set()
    for number, layer in enumerate(evals[0]["layers"]["student"]):
        cosines = [record["layers"]["cosine"][number] for record in evals]
        if any(cosine < max(cosines[: step + 1]) - 0.05 for step, cosine in enumerate(cosines)):
            falls.add(layer)
    assert falls
    assert {int(line.split("student layer ")[1].split(":")[0]) for line in lines} == falls
