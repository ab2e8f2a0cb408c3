"""The typed config: defaults, overrides, and mistakes that each cost the user one line to understand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from oprd_megatron.config import RunConfig, dump_config, load_config, parse_config
from oprd_megatron.config.base import sections_in
from oprd_megatron.config.rollout import PromptsConfig
from oprd_megatron.config.schema import EvalConfig, ParallelConfig
from oprd_megatron.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = sorted([*EXAMPLES.rglob("*.yaml"), *EXAMPLES.rglob("*.yml")])
MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/a"},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "rollout": {"prompts": {"path": "prompts.jsonl"}},
}
PARALLEL = {
    "tp": 1,
    "cp": 1,
    "pp": 1,
    "vpp": 1,
    "dp": None,
    "sp": False,
    "ranks": None,
    "layers_per_stage": None,
    "first_stage_layers": None,
    "last_stage_layers": None,
}
RECOMPUTE = {"granularity": "none", "method": "uniform", "num_layers": 1}
PRECISION = {
    "linear": "dtype",
    "recipe": "tensorwise",
    "fp8_parameters": None,
    "first_layers": 0,
    "last_layers": 0,
    "keep_layers": [],
    "keep_worst": 0,
    "noise": "off",
}
DEFAULTS = {
    "run": {
        "dir": "runs/a",
        "seed": 1234,
        "steps": 500,
        "stop_at": None,
        "time_limit_minutes": None,
        "time_margin_minutes": 1.0,
        "hang_minutes": 30.0,
        "micro_batch_size": 1,
        "micro_batch_tokens": None,
        "device": "auto",
        "export": True,
    },
    "teachers": [],
    "teaching": None,
    "teacher": {
        "path": "teacher",
        "dtype": "bf16",
        "precision": PRECISION,
        "parallel": PARALLEL,
        "pad_heads": False,
        "ema_decay": None,
    },
    "student": {
        "path": "student",
        "dtype": "bf16",
        "precision": PRECISION,
        "parallel": PARALLEL,
        "pad_heads": False,
        "recompute": RECOMPUTE,
    },
    "rollout": {
        "engine": "hf",
        "schedule": "sync",
        "max_staleness": 1,
        "prompts": {
            "path": "prompts.jsonl",
            "field": "prompt",
            "limit": None,
            "chat_template": True,
            "max_tokens": 1024,
            "teacher_template": None,
        },
        "prompts_per_step": 8,
        "responses_per_prompt": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_response_tokens": 1024,
        "stop": [],
        "num_engines": None,
        "batch_size": 64,
        "probe_tolerance": None,
        "overlap_tokens": None,
        "truncated": "keep",
        "duplicates": "keep",
        "empty": "keep",
        "timeout_seconds": None,
        "buffer": True,
        "file": None,
        "mismatch": {"every": 0, "gate": "none", "limit": 0.5},
        "vllm": {
            "tp": 1,
            "max_model_len": None,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": False,
            "cuda_graph_sizes": [],
            "args": {},
        },
        "server": {
            "urls": [],
            "start": 1,
            "python": None,
            "port": 8100,
            "ready_seconds": 900.0,
            "request_seconds": 600.0,
            "retries": 3,
            "inflight_tokens": 65536,
            "transfer": "auto",
            "transfer_dir": None,
            "bucket_bytes": 256 * 2**20,
        },
    },
    "distill": {
        "layers": "all",
        "layer_map": "proportional",
        "monotone_map": False,
        "layer_weights": "uniform",
        "final_layer_weights": None,
        "positions": "last_k",
        "k": 2000,
        "position_anchor": "token",
        "final_state": "post_norm",
        "normalize": "auto",
        "coefficient": 1.0,
        "mode": "auto",
        "bridge": None,
        "bridge_head": 0,
        "cross_tokenizer": False,
        "min_aligned": 0.0,
        "wire": "auto",
        "spool_bytes": None,
        "spool": "device",
    },
    "output": {"terms": [], "teacher_head": "auto", "chunk_tokens": 256},
    "bridge": {
        "rank": 8,
        "max_rank": 256,
        "prompts": 2000,
        "rows": 16384,
        "held_out": 0.1,
        "projector": "linear",
        "solver": "ridge",
        "ridge": 1e-4,
        "epochs": 20,
        "lr": 1e-3,
        "batch_rows": 256,
        "mlp_width": 512,
        "allow_constant": False,
        "map_width": 256,
        "map_ties": False,
        "map_floor": None,
        "warn_drop": 0.1,
        "refit_every": 0,
    },
    "optimizer": {
        "lr": 1e-5,
        "min_lr": 0.0,
        "warmup_fraction": 0.03,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_grad": 1.0,
        "distributed": False,
    },
    "checkpoint": {"every": 50, "keep": None, "keep_best": None, "asynchronous": False, "resume": "auto"},
    "eval": None,
    "benchmark": None,
    "logging": {
        "tensorboard": "auto",
        "wandb": None,
        "mlflow": None,
        "progress": True,
        "gradient_norms_every": 0,
        "slow_rank_factor": 1.5,
    },
}
EVAL_DEFAULTS = {"every": 10, "max_response_tokens": 64, "temperature": 1.0, "micro_batch_size": 4, "samples": 3}
EVERYTHING = {
    "run": {
        "dir": "/tmp/b: c",
        "seed": 0,
        "steps": 3,
        "micro_batch_size": 4,
        "micro_batch_tokens": 4096,
        "device": "cpu",
        "export": False,
    },
    "teacher": {
        "path": "t",
        "dtype": "fp32",
        "parallel": {"tp": 2, "pp": 2, "layers_per_stage": [3, 1], "ranks": "0-3"},
    },
    "student": {
        "path": "s",
        "parallel": {
            "tp": 2,
            "cp": 2,
            "pp": 2,
            "vpp": 2,
            "first_stage_layers": 1,
            "last_stage_layers": 2,
            "ranks": "4-11",
        },
        "pad_heads": True,
        "recompute": {"granularity": "full", "method": "block", "num_layers": 2},
    },
    "rollout": {
        "prompts": {"path": "p.parquet", "field": "q", "limit": 7, "chat_template": False},
        "temperature": 0.5,
        "top_p": 0.95,
        "stop": ["\n\n", "null", "12", "1e5", "ж"],
        "probe_tolerance": 1e-3,
    },
    "distill": {
        "layers": [1, 4],
        "layer_map": {1: 2, 4: 4},
        "normalize": "l2",
        "coefficient": [[0, 300], [0.5, 300], [0.5, 0]],
        "bridge": "bridge.safetensors",
        "bridge_head": 2,
        "mode": "low_rank_residual",
        "monotone_map": True,
        "layer_weights": [1, 0.5],
        "final_layer_weights": "depth",
        "wire": "fp8",
        "spool_bytes": "1.5GiB",
        "spool": "host",
    },
    "output": {
        "terms": [
            {"kind": "sampled", "estimator": "k3", "temperature": 0.5, "weight": 2},
            {"kind": "topk", "name": "near", "k": 4, "support": "union", "rest": "tail", "positions": "first_k"},
            {
                "kind": "full",
                "divergence": "jensen_shannon",
                "mixing": 0.1,
                "weight": [[0.25, 0], [1, 3]],
                "first_or_last": 9,
            },
        ],
        "teacher_head": "student",
        "chunk_tokens": 64,
    },
    "bridge": {"rank": 4, "projector": "mlp", "solver": "sgd", "refit_every": 50, "warn_drop": 0.2},
    "optimizer": {"lr": 3e-7, "min_lr": 1e-7, "betas": [0.8, 0.95], "eps": 1e-12, "distributed": True},
    "checkpoint": {"every": 0, "keep": 2, "asynchronous": True, "resume": "never"},
    "eval": {"prompts": {"path": "held_out.json"}, "every": 0},
    "logging": {"tensorboard": False, "progress": False, "gradient_norms_every": 10},
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def message(folder: Path, overrides: list[str], values: Any = MINIMAL) -> str:
    """The one line a mistake costs, without the file's name in front of it."""
    path = write(folder, values)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text, text
    return text.removeprefix(f"{path}: ")


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """This section and those inside it, also those of a list that `kind` tells apart."""
    found = {model}
    for field in model.model_fields.values():
        for member in sections_in(field.annotation):
            found |= sections(member)
    return found


def test_every_default() -> None:
    """What a config leaves open has the documented default; a changed default must be changed here on purpose."""
    assert yaml.safe_load(dump_config(parse_config(MINIMAL, "minimal"))) == DEFAULTS
    evaluation = EvalConfig(prompts=PromptsConfig(path=Path("p"))).model_dump(exclude={"prompts"})
    assert evaluation == EVAL_DEFAULTS


def test_every_field_is_documented() -> None:
    """Every key of every section has a text for `--help-config`."""
    models = sections(RunConfig)
    assert len(models) == 28
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"


def test_config_is_frozen() -> None:
    """A checked config cannot change under the run that uses it."""
    config = parse_config(MINIMAL, "minimal")
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0


@pytest.mark.parametrize("values", [MINIMAL, EVERYTHING], ids=["minimal", "everything"])
def test_dump_and_load_are_inverse(tmp_path: Path, values: dict) -> None:
    """The resolved config that a run writes down reads back to an equal one."""
    config = parse_config(values, "test")
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=2e-4", 2e-4),
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=.5E-3", 0.5e-3),
        ("run.steps=12", 12),
        ("run.seed=-1", -1),
        ("run.dir=other/place", Path("other/place")),
        ("run.export=false", False),
        ("distill.layers=[1,2]", [1, 2]),
        ("distill.layers=odd", "odd"),
        ("distill.layer_map={1: 3, 2: 5}", {1: 3, 2: 5}),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("rollout.prompts.limit=5", 5),
        ("rollout.prompts.path=a=b.jsonl", Path("a=b.jsonl")),
        ("checkpoint.keep=null", None),
        ("rollout.stop=[user, 'x y']", ["user", "x y"]),
        ("student.parallel.layers_per_stage=[4]", [4]),
        ("teacher.parallel.layers_per_stage=follow_student", "follow_student"),
        ("student.parallel.ranks=0-7", "0-7"),
        ("distill.spool_bytes=512MiB", 512 * 2**20),
        ("distill.spool_bytes=4096", 4096),
        ("distill.wire=fp8", "fp8"),
        ("distill.bridge=bridge.safetensors", Path("bridge.safetensors")),
        ("distill.coefficient=[[0, 1], [1, 0]]", [(0.0, 1.0), (1.0, 0.0)]),
        ("output.chunk_tokens=64", 64),
        ("run.micro_batch_tokens=8192", 8192),
    ],
)
def test_overrides(tmp_path: Path, override: str, expected: Any) -> None:
    """`key.sub=value` sets that key, read as YAML, and nothing else; sections that the file leaves out are created."""
    path = write(tmp_path, MINIMAL)
    changed = load_config(path, [override]).model_dump()
    before = load_config(path).model_dump()
    *parents, leaf = override.split("=")[0].split(".")
    for values in (changed, before):
        node = values
        for parent in parents:
            node = node[parent]
        found = node.pop(leaf)
        if values is changed:
            assert found == expected and type(found) is type(expected)
    assert changed == before


def test_overrides_create_and_remove_sections(tmp_path: Path) -> None:
    """An optional section can be made, nested, from the command line, and taken away with null; the last one wins."""
    path = write(tmp_path, MINIMAL)
    made = load_config(path, ["eval.prompts.path=held_out.jsonl", "eval.every=1", "eval.every=3"])
    assert made.eval is not None
    assert (made.eval.prompts.path, made.eval.every) == (Path("held_out.jsonl"), 3)
    assert load_config(write(tmp_path, MINIMAL | {"eval": EVERYTHING["eval"]}), ["eval=null"]).eval is None
    assert load_config(write(tmp_path, MINIMAL | {"eval": None}), ["eval.prompts.path=x"]).eval is not None


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text; in the file and in lists it is a number all the same."""
    text = (
        "run: {dir: a, steps: 1e2}\nteacher: {path: t}\nstudent: {path: s}\nrollout: {prompts: {path: p}}\n"
        "optimizer: {lr: 1e-5, betas: [9e-1, 1e-1], eps: 1E-9}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.run.steps, config.optimizer.lr, config.optimizer.eps) == (100, 1e-5, 1e-9)
    assert config.optimizer.betas == (0.9, 0.1)


@pytest.mark.parametrize(
    ("override", "start", "suggestion"),
    [
        (
            "optimiser.lr=1",
            "optimiser: unknown key; did you mean 'optimizer'?",
            "known here: run, teachers, teaching, teacher, student",
        ),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key;", "lr, min_lr, warmup_fraction"),
        ("optimizer.warmup=1", "optimizer.warmup: unknown key; did you mean 'warmup_fraction'?", "betas"),
        ("student.parallel.tpp=2", "student.parallel.tpp: unknown key; did you mean 'tp'?", "layers_per_stage"),
        ("rollout.prompts.limits=2", "rollout.prompts.limits: unknown key; did you mean 'limit'?", "chat_template"),
        ("eval.prompt.path=x", "eval.prompt: unknown key; did you mean 'prompts'?", "max_response_tokens"),
        ("eval.prompts.pth=x", "eval.prompts.pth: unknown key; did you mean 'path'?", "chat_template"),
    ],
)
def test_unknown_keys_name_their_neighbour(tmp_path: Path, override: str, start: str, suggestion: str) -> None:
    """A misspelt key is refused in every section, with the nearest key and those there are."""
    text = message(tmp_path, [override])
    assert text.startswith(start), text
    assert suggestion in text


@pytest.mark.parametrize("key", ["run", "run.dir", "teacher", "teacher.path", "student.path", "rollout.prompts"])
def test_missing_required_keys_are_named(tmp_path: Path, key: str) -> None:
    """What has no default has to be given, and the message says which key."""
    section, _, leaf = key.partition(".")
    values = {name: dict(content) for name, content in MINIMAL.items()}
    if leaf:
        del values[section][leaf]
    else:
        del values[section]
    assert message(tmp_path, [], values) == f"{key}: required, but not given"


@pytest.mark.parametrize(
    ("overrides", "starts", "says"),
    [
        (["student.parallel.sp=true"], "student.parallel: sp: true needs tp > 1", ""),
        (["teacher.parallel.sp=true"], "teacher.parallel: sp: true needs tp > 1", ""),
        (["student.parallel.vpp=2"], "student.parallel: vpp: 2 needs pp > 1", "use vpp: 1"),
        (["student.parallel.ranks=7-0"], "student.parallel: ranks: 7-0 ends before it starts", "for example 0-7"),
        (
            ["student.parallel.pp=2", "student.parallel.layers_per_stage=[1,2,3]"],
            "student.parallel: layers_per_stage names 3 stages, but pp 2 x vpp 1 = 2",
            "",
        ),
        (
            ["teacher.parallel.pp=2", "teacher.parallel.vpp=2", "teacher.parallel.layers_per_stage=[2,2]"],
            "teacher.parallel: layers_per_stage names 2 stages, but pp 2 x vpp 2 = 4",
            "",
        ),
        (
            ["teacher.parallel={pp: 2, layers_per_stage: [2, 2], first_stage_layers: 2}"],
            "teacher.parallel: layers_per_stage and first_stage_layers/last_stage_layers say the same",
            "give one of them",
        ),
        (
            ["teacher.parallel={pp: 2, layers_per_stage: follow_student, last_stage_layers: 2}"],
            "teacher.parallel: layers_per_stage and first_stage_layers/last_stage_layers say the same",
            "",
        ),
        (
            ["student.parallel.last_stage_layers=2"],
            "student.parallel: first_stage_layers and last_stage_layers need pp > 1",
            "",
        ),
        (
            ["student.parallel.layers_per_stage=follow_student"],
            "student: parallel.layers_per_stage: follow_student is for the teacher",
            "",
        ),
        (["optimizer.min_lr=1e-4"], "optimizer: min_lr 0.0001 is above lr 1e-05", ""),
        (["run.micro_batch_size=3"], "rollout.prompts_per_step", "= 16 is not a multiple of run.micro_batch_size 3"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, overrides: list[str], starts: str, says: str) -> None:
    """Each check across keys names the keys and the numbers, in one line."""
    text = message(tmp_path, overrides)
    assert text.startswith(starts) and says in text, text


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.parallel.tp=2", "teacher.parallel.tp=2", "student.parallel.sp=true", "teacher.parallel.sp=true"],
        ["student.parallel.pp=2", "teacher.parallel.pp=2", "teacher.parallel.layers_per_stage=[9,1]"],
        ["optimizer.min_lr=1e-5"],
        ["run.micro_batch_size=8"],
        ["run.micro_batch_size=3", "run.micro_batch_tokens=100"],
        ["student.parallel={pp: 2, vpp: 2, layers_per_stage: [1, 2, 3, 4]}"],
        ["student.parallel={pp: 3, first_stage_layers: 1, last_stage_layers: 2}"],
        ["teacher.parallel={pp: 2, layers_per_stage: follow_student}"],
        ["teacher.parallel.ranks=0-0", "student.parallel.ranks=1-1"],
    ],
)
def test_keys_that_agree_pass(tmp_path: Path, overrides: list[str]) -> None:
    """The other side of each check across keys: layers_per_stage may differ, min_lr may equal lr."""
    load_config(write(tmp_path, MINIMAL), overrides)


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("run.steps=0", "run.steps", "0"),
        ("run.device=gpu", "run.device", "'gpu'"),
        ("teacher.dtype=fp8", "teacher.dtype", "'fp8'"),
        ("rollout.temperature=-1", "rollout.temperature", "-1"),
        ("rollout.top_p=0", "rollout.top_p", "0"),
        ("rollout.top_p=1.5", "rollout.top_p", "1.5"),
        ("rollout.probe_tolerance=0", "rollout.probe_tolerance", "0"),
        ("distill.layers=some", "distill.layers", "'some'"),
        ("distill.layers=[0]", "distill.layers", "greater than 0 (got 0)"),
        ("distill.layers=[1, a]", "distill.layers", "valid integer"),
        ("distill.layer_map={1: 0}", "distill.layer_map", "greater than 0 (got 0)"),
        ("optimizer.lr=.inf", "optimizer.lr", "finite"),
        ("distill.coefficient=-1", "distill.coefficient", "-1"),
        ("distill.coefficient=much", "distill.coefficient", "'much'"),
        ("output.chunk_tokens=0", "output.chunk_tokens", "0"),
        ("output.teacher_head=both", "output.teacher_head", "'both'"),
        ("output.terms=3", "output.terms", "list (got 3)"),
        ("logging.gradient_norms_every=-1", "logging.gradient_norms_every", "-1"),
        ("distill.layer_weights=middle", "distill.layer_weights", "'middle'"),
        ("distill.layer_weights=[1, -1]", "distill.layer_weights", "-1"),
        ("distill.layer_weights=[1, .inf]", "distill.layer_weights", "finite"),
        ("distill.bridge_head=-1", "distill.bridge_head", "-1"),
        ("distill.bridge_head=2", "distill", "mode: low_rank_residual and bridge_head"),
        ("distill.mode=low_rank_residual", "distill", "bridge_head: N"),
        ("distill.mode=cca", "distill.mode", "'cca'"),
        ("distill.min_aligned=0.5", "distill", "set cross_tokenizer: true"),
        ("bridge.projector=mlp", "bridge", "set solver: sgd"),
        ("bridge.rank=0", "bridge.rank", "0"),
        ("bridge.refit_every=-1", "bridge.refit_every", "-1"),
        ("bridge.warn_drop=2", "bridge.warn_drop", "2"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan"),
        ("optimizer.lr=fast", "optimizer.lr", "'fast'"),
        ("optimizer.betas=[0.9,2]", "optimizer.betas", "2"),
        ("checkpoint.every=-1", "checkpoint.every", "-1"),
        ("checkpoint.keep=0", "checkpoint.keep", "0"),
        ("logging=3", "logging", "3"),
        ("rollout=null", "rollout", "None"),
        ("student.parallel.cp=0", "student.parallel.cp", "0"),
        ("student.parallel.vpp=0", "student.parallel.vpp", "0"),
        ("student.parallel.ranks=4", "student.parallel.ranks", "4"),
        ("student.parallel.ranks=a-b", "student.parallel.ranks", "'a-b'"),
        ("student.parallel.first_stage_layers=0", "student.parallel.first_stage_layers", "0"),
        ("teacher.parallel.layers_per_stage=even", "teacher.parallel.layers_per_stage", "'even'"),
        ("teacher.parallel.layers_per_stage=[2, 0]", "teacher.parallel.layers_per_stage", "0"),
        ("student.recompute.granularity=some", "student.recompute.granularity", "'some'"),
        ("student.recompute.num_layers=0", "student.recompute.num_layers", "0"),
        ("distill.wire=fp4", "distill.wire", "'fp4'"),
        ("distill.spool_bytes=0", "distill.spool_bytes", "0"),
        ("distill.spool_bytes=much", "distill.spool_bytes", "'much'"),
        ("distill.spool=disk", "distill.spool", "'disk'"),
        ("run.micro_batch_tokens=0", "run.micro_batch_tokens", "0"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, override: str, key: str, given: str) -> None:
    """A value of the wrong type or size costs one line that starts with the key and ends with what was given."""
    text = message(tmp_path, [override])
    assert text.startswith(f"{key}: ") and given in text, text


def test_ranks_are_read_as_numbers() -> None:
    """`ranks: first-last` names both ends; left out, the grid begins at rank 0 and takes what there is."""
    named, single, open_ended = ParallelConfig(ranks="4-11"), ParallelConfig(ranks="3-3"), ParallelConfig()
    assert (named.first_rank, named.num_ranks) == (4, 8)
    assert (single.first_rank, single.num_ranks) == (3, 1)
    assert (open_ended.first_rank, open_ended.num_ranks) == (0, None)


@pytest.mark.parametrize(
    ("text", "size"), [("100B", 100), ("2KB", 2000), ("2KiB", 2048), ("1.5GiB", 3 * 2**29), (7, 7)]
)
def test_byte_sizes(tmp_path: Path, text: Any, size: int) -> None:
    """Bytes as a number or with a decimal or binary unit."""
    assert load_config(write(tmp_path, MINIMAL | {"distill": {"spool_bytes": text}})).distill.spool_bytes == size


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nonsense", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("run.steps=[", "the value is not valid YAML"),
        ("run.dir.sub=3", "dir is a value, not a section"),
    ],
)
def test_malformed_overrides(tmp_path: Path, override: str, says: str) -> None:
    """An override that cannot be read is quoted back with what was expected."""
    assert message(tmp_path, [override]) == f"override {override!r}: {says}"


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n- b", "expected a mapping"), ("", "expected a mapping"), ("run: {dir: a\nteacher: 3", "not valid YAML")],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, says: str) -> None:
    """A file that holds something else is named, for broken YAML with the line."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00a", b"a: \x00b"], ids=["binary", "control character"])
def test_files_that_are_no_text(tmp_path: Path, content: bytes) -> None:
    """A binary file given by mistake costs one line too."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: not ") and "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    """A path without a file costs one line that names it."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the config"):
        load_config(tmp_path / "nowhere.yaml")


def test_config_imports_no_torch() -> None:
    """A config is checked in milliseconds on a machine without torch."""
    code = "import oprd_megatron.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_quickstart_is_shipped() -> None:
    """The next test reads what is there; this one makes sure that something is."""
    assert EXAMPLES / "quickstart.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load(path: Path) -> None:
    """Every YAML under examples/ is a valid config."""
    load_config(path)
