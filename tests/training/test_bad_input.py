"""A user's mistake is one line that says what, where and what to do, before anything is written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import oprd_megatron.saving.saver
from checkpoints_conversion.interop import RUN_CONFIG
from oprd_megatron.config import dump_config, load_config, parse_config
from oprd_megatron.errors import UserError
from oprd_megatron.preflight import preflight
from oprd_megatron.run_directory.files import CONFIG_FILE
from oprd_megatron.run_directory.lock import LOCK_FILE
from oprd_megatron.saving.retention import FIGURES
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model, tiny_tokenizer
from tests.training.runs import changed, train_on_rank, train_run, with_layout

Values = dict[str, Any]
Mistake = Callable[[Values, Path], Values]


def files_below(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK_FILE}


def refusal(values: Values, folder: Path, world_size: int = 1) -> str:
    """The one line with which preflight refuses a run; nothing below `folder` may change."""
    before = files_below(folder)
    with pytest.raises(UserError) as caught:
        preflight(parse_config(values, "test"), world_size)
    assert "\n" not in str(caught.value)
    assert files_below(folder) == before
    return str(caught.value)


def remake(values: Values, name: str, **shape: Any) -> Values:
    """Write one of the models again, in another shape."""
    family = shape.pop("family", "llama")
    tiny_hf_model(family, values[name]["path"], **{"num_layers": 4, "std": 0.1, **shape})
    return values


def edit_config(values: Values, name: str, **keys: Any) -> Values:
    path = Path(values[name]["path"], "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return values


def write_train_file(values: Values, text: str) -> Values:
    Path(values["rollout"]["prompts"]["path"]).write_text(text)
    return values


def shard(values: Values, drop: str | None) -> Values:
    """Split the student's weights over two files with an index, then lose one of them."""
    folder = Path(values["student"]["path"])
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "model.safetensors").unlink()
    if drop is not None:
        (folder / drop).unlink()
    return values


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def truncated_weights(values: Values, folder: Path) -> Values:
    truncate(folder / "teacher" / "model.safetensors")
    return values


def another_tokenizer(values: Values, folder: Path) -> Values:
    tiny_tokenizer(folder / "teacher", extra_tokens=("<extra>",))
    return values


def overlapping(values: Values, folder: Path) -> Values:
    with (folder / "held_out.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "say 3"}) + "\n")
    return values


def another_run(values: Values, folder: Path) -> Values:
    """The run directory holds a run that supervises the last layer only."""
    run_dir = Path(values["run"]["dir"])
    run_dir.mkdir()
    before = parse_config({**values, "distill": {"layers": "last"}}, "test")
    (run_dir / CONFIG_FILE).write_text(dump_config(before))
    return values


def file_as_run_dir(values: Values, folder: Path) -> Values:
    (folder / "notes.txt").write_text("mine")
    return changed(values, run={"dir": str(folder / "notes.txt")})


def below_a_file(values: Values, folder: Path) -> Values:
    return changed(file_as_run_dir(values, folder), run={"dir": str(folder / "notes.txt" / "run")})


MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "no model directory": (
        lambda v, _: changed(v, teacher={"path": "/no/such/model"}),
        ["/no/such/model", "no such model directory", "give the directory"],
    ),
    "a shard is missing": (
        lambda v, _: shard(v, drop="model-00002-of-00002.safetensors"),
        ["student/model-00002-of-00002.safetensors", "missing (1 of 2 shards", "finish the download"],
    ),
    "truncated weights": (truncated_weights, ["teacher/model.safetensors", "truncated", "download it again"]),
    "unknown architecture": (
        lambda v, _: edit_config(v, "student", model_type="mamba", architectures=["MambaForCausalLM"]),
        ["student/config.json", "mamba", "llama"],
    ),
    "unknown key in config.json": (
        lambda v, _: edit_config(v, "teacher", sliding_stride=3),
        ["teacher/config.json", "sliding_stride"],
    ),
    "widths differ": (
        lambda v, _: remake(v, "teacher", hidden_size=64, ffn=128),
        ["64 and 32", "`oprd bridge fit`", "distill.mode: linear"],
    ),
    "student layer out of range": (
        lambda v, _: {**v, "distill": {"layers": [1, 5]}},
        ["distill.layers", "student layer 5", "layers 1 to 4"],
    ),
    "student layer of the map out of range": (
        lambda v, _: {**v, "distill": {"layer_map": {6: 1}}},
        ["distill.layer_map", "student layer 6", "layers 1 to 4"],
    ),
    "teacher layer of the map out of range": (
        lambda v, _: {**v, "distill": {"layer_map": {1: 7}}},
        ["distill.layer_map", "teacher layer 7", "layers 1 to 5"],
    ),
    "no prompt file": (
        lambda v, _: changed(v, rollout={"prompts": {"path": "/no/prompts.jsonl"}}),
        ["/no/prompts.jsonl", "no such file", "check"],
    ),
    "unknown kind of prompt file": (
        lambda v, _: changed(v, rollout={"prompts": {"path": "prompts.csv"}}),
        ["prompts.csv", "use one of .jsonl"],
    ),
    "empty prompt file": (lambda v, _: write_train_file(v, ""), ["train.jsonl", "holds no prompts"]),
    "malformed line": (
        lambda v, _: write_train_file(v, '{"prompt": "a"}\n\n{"prompt": "b"\n'),
        ["train.jsonl:3", "not valid JSON"],
    ),
    "line without the field": (
        lambda v, _: write_train_file(v, '{"prompt": "a"}\n{"question": "b"}\n'),
        ["train.jsonl:2", "no field 'prompt'", "question"],
    ),
    "empty prompt": (lambda v, _: write_train_file(v, '{"prompt": " "}\n'), ["train.jsonl:1", "is empty"]),
    "tokenizer larger than the student's vocabulary": (
        lambda v, _: remake(v, "student", vocab_size=200),
        ["student", "token ids up to 259", "vocab_size is 200"],
    ),
    "tokenizer larger than the teacher's vocabulary": (
        lambda v, _: remake(v, "teacher", vocab_size=200),
        ["teacher", "token ids up to 259", "vocab_size is 200"],
    ),
    "tokenizers differ": (another_tokenizer, ["tokenizers differ", "'<extra>'", "share one tokenizer"]),
    "held-out prompt is a training prompt": (
        overlapping,
        ["held_out.jsonl", "1 of 13", "'say 3'", "remove them"],
    ),
    "run.dir is a file": (file_as_run_dir, ["run.dir", "notes.txt", "choose another run.dir"]),
    "run.dir below a file": (below_a_file, ["run.dir", "notes.txt", "choose another run.dir"]),
    "run.dir below a device": (
        lambda v, _: changed(v, run={"dir": "/dev/null/run"}),
        ["run.dir", "/dev/null", "choose another run.dir"],
    ),
    "run.dir of another run": (another_run, ["another distill", "use another run.dir"]),
    "responses do not fit": (
        lambda v, _: changed(v, rollout={"max_response_tokens": 510}),
        ["rollout:", "context of 512", "lower rollout.max_response_tokens"],
    ),
    "held-out answers do not fit": (
        lambda v, _: changed(v, eval={"max_response_tokens": 510}),
        ["eval:", "context of 512", "lower eval.max_response_tokens"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_before_anything_is_written(tmp_path: Path, values: Values, mistake: str) -> None:
    """Each names its place and the way out."""
    make, fragments = MISTAKES[mistake]
    error = refusal(make(values, tmp_path), tmp_path)
    for fragment in fragments:
        assert fragment in error


LAYOUT_MISTAKES: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "tp does not divide the heads": ({"tp": 3}, 3, ["parallel: tp 3", "4 attention heads", "pad_heads: true"]),
    "tp does not divide the key/value heads": ({"tp": 4}, 4, ["tp 4", "2 key/value heads", "pad_heads: true"]),
    "the product is not the ranks": ({"tp": 2, "pp": 2, "dp": 2}, 4, ["tp 2 x pp 2 x dp 2 = 8, but 4 ranks"]),
    "the ranks do not factor": ({"tp": 2}, 3, ["tp 2 x pp 1 x dp 1 = 2, but 3 ranks"]),
    "more stages than layers": (
        {"pp": 6},
        6,
        ["pp 6 is more than the model's 4 layers", "nearest that fit: tp 1 x pp 3 x dp 2"],
    ),
    "the batch does not split": ({"dp": 3}, 3, ["= 8 is not a multiple", "micro_batch_size 2 x dp 3 = 6"]),
}


@pytest.mark.parametrize("mistake", LAYOUT_MISTAKES)
def test_layouts_that_cannot_work(tmp_path: Path, values: Values, mistake: str) -> None:
    """The line has the product or divisor that failed."""
    parallel, world_size, fragments = LAYOUT_MISTAKES[mistake]
    error = refusal(with_layout(values, **parallel), tmp_path, world_size)
    for fragment in fragments:
        assert fragment in error


def test_rollouts_that_do_not_split_into_micro_batches(tmp_path: Path, values: Values) -> None:
    """Refused when the config is read, before any model is looked at."""
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(parse_config(values, "test")))
    with pytest.raises(UserError, match=r"= 8 is not a multiple of run.micro_batch_size 3$"):
        load_config(path, ["run.micro_batch_size=3"])


def test_complete_shards_pass(values: Values) -> None:
    """The control of the broken ones: the same two files, both there."""
    assert preflight(parse_config(shard(values, drop=None), "test"), 1).student.num_layers == 4
    assert not Path(values["run"]["dir"]).exists()


@pytest.mark.parametrize("text", ["7", "nonsense", "", "1\n2", "\x00", "../..", "9" * 400])
def test_tracker_that_names_nothing(tmp_path: Path, values: Values, text: str) -> None:
    """Garbage in the tracker file, or a checkpoint that is gone: the file is named, and nothing is taken for a start."""
    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(text)
    error = refusal(values, tmp_path)
    assert str(tracker) in error and "missing or incomplete" in error and len(error) < 600


def test_tracker_that_is_not_text(tmp_path: Path, values: Values) -> None:
    """Bytes that are not UTF-8 are garbage like any other."""
    tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_bytes(b"\xff\xfe\x80")
    assert str(tracker) in refusal(values, tmp_path)


def failing_run(values: Values) -> str:
    with pytest.raises(UserError) as caught:
        train_on_rank(values)
    return str(caught.value)


def short_run(values: Values, **layout: int) -> Values:
    """Two of four steps, with a checkpoint after each."""
    values = changed(with_layout(values, **layout), run={"steps": 4, "stop_at": 2})
    values = {**values, "checkpoint": {"every": 1}, "eval": None}
    train_run(values)
    return changed(values, run={"stop_at": None})


def test_damaged_checkpoints(tmp_path: Path, values: Values) -> None:
    """A run refuses a checkpoint with any of the files that it reads cut in half, naming it, without touching metrics or
    checkpoints; `resume: never` refuses a whole one; with the tracker set back to an older one the run goes on."""
    values = short_run(values, dp=2)
    run_dir = tmp_path / "run"
    assert "set checkpoint.resume: auto" in refusal(
        {**values, "checkpoint": {"every": 1, "resume": "never"}}, tmp_path, world_size=2
    )
    newest = run_dir / "checkpoints" / "iter_0000002"
    others = {FIGURES, RUN_CONFIG}  # not what a run goes on from
    files = [path for path in sorted(newest.iterdir()) if path.stat().st_size > 1 and path.name not in others]
    assert {".metadata", "common.pt", "metadata.json"} < {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        truncate(path)
        before = files_below(run_dir)
        errors = run_ranks(2, failing_run, values)
        assert len(set(errors)) == 1 and "\n" not in errors[0], path.name
        assert str(newest) in errors[0] and "cannot read the checkpoint" in errors[0], path.name
        assert "start in a fresh run directory" in errors[0]
        assert files_below(run_dir) == before, path.name
        path.write_bytes(whole)
    truncate(files[0])
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    train_run(values)
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"


def run_on_a_full_disk(values: Values, max_bytes: int) -> str:
    """Train; while the third checkpoint is written no file may grow beyond `max_bytes`, as on a disk that is full."""
    write = oprd_megatron.saving.saver.write_checkpoint

    def write_on_full_disk(config: Any, student: Any, optimizer: Any, progress: Any, *others: Any) -> Any:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if progress.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
        try:
            return write(config, student, optimizer, progress, *others)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    oprd_megatron.saving.saver.write_checkpoint = write_on_full_disk
    return failing_run(values)


@pytest.mark.parametrize(("layout", "file"), [({}, "common.pt"), ({}, "__0_0.distcp"), ({"dp": 2}, "__0_0.distcp"),
                                              ({"pp": 2}, "__1_0.distcp")], ids=str)  # fmt: skip
def test_disk_full_in_the_middle_of_a_checkpoint(
    tmp_path: Path, values: Values, layout: dict[str, int], file: str
) -> None:
    """Whatever file no longer fits, every rank stops with one line; the checkpoint before stays the newest and the run goes
    on from it. (Rank 0 alone writes common.pt and ends the others by leaving: see tests/test_cli.py.)"""
    values = short_run(values, **layout)
    folder = tmp_path / "run" / "checkpoints"
    sizes = {path.name: path.stat().st_size for path in (folder / "iter_0000002").iterdir()}
    errors = run_ranks(2 if layout else 1, run_on_a_full_disk, values, sizes[file] - 1)
    for error in errors:
        assert "\n" not in error
        assert str(folder / "iter_0000003.incomplete") in error and "free disk space" in error
    assert sorted(path.name for path in folder.glob("iter_???????")) == ["iter_0000001", "iter_0000002"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "2"
    train_run(values)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert not list(folder.glob("*.incomplete"))
