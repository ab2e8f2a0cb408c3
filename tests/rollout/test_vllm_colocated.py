"""vLLM in the trainer's processes: the embedded engine's run on any layout, and nothing is asked of an engine that sleeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from oprd_megatron.config.rollout import RolloutConfig
from oprd_megatron.errors import ConfigError, WeightSyncError
from oprd_megatron.parallel.activity import here
from oprd_megatron.rollout.engine import Request, SamplingParams
from oprd_megatron.rollout.probe import PROBE_STEP
from oprd_megatron.rollout.prompts import Prompt
from oprd_megatron.rollout.vllm.client import Vocabulary
from oprd_megatron.rollout.vllm.colocated import ColocatedEngine
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY
from tests.rollout.vllm_server import CHECKOUT, vllm_python
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, student_tensors, tiny_run, train_records, with_layout

SECONDS = 120.0
LOST = "model.layers.2.mlp.down_proj.weight"
REQUESTS = [Request(Prompt(0, "", (5, 6, 7)), 0)]


class FakeLLM:
    """vLLM's `LLM` without a model: notes what it is asked, and refuses what a sleeping engine cannot do."""

    refusal: ValueError | None = None
    calls: list[str]

    def __init__(self, model: str, **options: Any) -> None:
        if FakeLLM.refusal is not None:
            raise FakeLLM.refusal
        FakeLLM.calls = []
        self.options, self._sleeps = options, False
        finalizer = SimpleNamespace(detach=lambda: FakeLLM.calls.append("detach"))
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(_finalizer=finalizer))

    def generate(self, inputs: list[dict], asked: list[Any], use_tqdm: Any) -> list[Any]:
        self._note("generate")
        with use_tqdm(total=len(inputs)) as bar:
            for _ in inputs:
                bar.update()
        place = {token: SimpleNamespace(logprob=-1.0) for token in range(10)}
        answer = SimpleNamespace(token_ids=[2], logprobs=[place], finish_reason="stop")
        return [SimpleNamespace(outputs=[answer], prompt_logprobs=[place] * 3) for _ in inputs]

    def collective_rpc(self, method: Any, args: tuple) -> list[Any]:
        self._note("load")
        if args[0] < 0:
            raise WeightSyncError("too few tensors")
        return [None]

    def reset_prefix_cache(self) -> bool:
        self._note("reset_prefix_cache")
        return True

    def sleep(self, level: int) -> None:
        self._note(f"sleep {level}")
        self._sleeps = True

    def wake_up(self) -> None:
        assert self._sleeps, "woken twice"
        self._sleeps = False
        self._note("wake_up")

    def _note(self, what: str) -> None:
        assert not self._sleeps, f"{what} of a sleeping engine"
        FakeLLM.calls.append(what)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 0 of one, with a GPU and a vLLM that are none."""
    vllm, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    vllm.LLM, vllm.SamplingParams = FakeLLM, SimpleNamespace  # type: ignore[attr-defined]
    distributed.destroy_model_parallel = lambda: FakeLLM.calls.append("destroy groups")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(FakeLLM, "refusal", None)
    return monkeypatch


def engine_of(**vllm: Any) -> ColocatedEngine:
    config = RolloutConfig(engine="vllm", prompts={"path": "prompts.jsonl"}, vllm=vllm)  # type: ignore[arg-type]
    return ColocatedEngine(Path("student"), config, "fp32", Vocabulary(10, (2,)), 64, seed=0)


def test_it_is_awake_whenever_it_is_asked(on_a_gpu: pytest.MonkeyPatch) -> None:
    """The probe leaves it awake for the step's text; after that it sleeps, until it writes again or gets weights; waking comes
    before the weights, and the old ones' cache is dropped after them. At its end nothing sleeps twice."""
    engine = engine_of()
    engine.update_weights(0, iter([]))
    engine.generate(REQUESTS, SamplingParams(), PROBE_STEP)
    assert [score.shape for score in engine.score([[5, 6, 7]])] == [(2,)]
    engine.generate(REQUESTS, SamplingParams(), 0)
    asleep = ["load", "reset_prefix_cache", "generate", "generate", "generate", "generate", "sleep 1"]
    assert FakeLLM.calls == asleep
    engine.generate(REQUESTS, SamplingParams(), 1)
    assert FakeLLM.calls == [*asleep, "wake_up", "generate", "sleep 1"]
    FakeLLM.calls.clear()
    engine.update_weights(1, iter([]))
    assert FakeLLM.calls == ["wake_up", "load", "reset_prefix_cache"]
    engine.generate([], SamplingParams(), 2)
    engine.close()
    assert FakeLLM.calls[3:] == ["sleep 1", "detach", "destroy groups"]


def test_every_answer_is_a_sign_of_life(on_a_gpu: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """A rank whose engine writes for long does not hang; and no progress bar of vLLM's is seen."""
    engine = engine_of()
    engine.update_weights(0, iter(()))
    before = here.marks
    engine.generate(REQUESTS, SamplingParams(), 0)
    assert here.marks == before + len(REQUESTS)
    assert capfd.readouterr().err == ""


def test_an_awake_engine_gives_its_memory_back_at_its_end(on_a_gpu: pytest.MonkeyPatch) -> None:
    """As after the last step of a run, which updates the weights and writes nothing; then it cannot be asked any more."""
    engine = engine_of()
    engine.update_weights(0, iter([]))
    engine.close()
    assert FakeLLM.calls[2:] == ["sleep 2", "detach", "destroy groups"]
    with pytest.raises(WeightSyncError, match="no weights"):
        engine.generate(REQUESTS, SamplingParams(), 0)


def test_nothing_is_written_after_a_failed_update(on_a_gpu: pytest.MonkeyPatch) -> None:
    """Its weights may be of two versions; the next whole update mends that."""
    engine = engine_of()
    engine.update_weights(0, iter([]))
    with pytest.raises(WeightSyncError, match="too few"):
        engine.update_weights(-1, iter([]))
    with pytest.raises(WeightSyncError, match="its last update failed"):
        engine.generate(REQUESTS, SamplingParams(), 0)
    engine.update_weights(1, iter([]))
    assert engine.generate(REQUESTS, SamplingParams(), 0)[0].weight_version == 1


def test_a_config_that_cannot_work_is_refused(on_a_gpu: pytest.MonkeyPatch) -> None:
    """Groups that do not divide the ranks, sizes behind vllm.tp's back, and what vLLM itself refuses, in one line each."""
    with pytest.raises(ConfigError, match="tp: 2 does not divide the run's 1 ranks"):
        engine_of(tp=2)
    with pytest.raises(ConfigError, match="data_parallel_size is not for colocated engines"):
        engine_of(args={"data_parallel_size": 2})
    around = "1 validation error for VllmConfig\n  Value error, 9 heads\n over 2 ranks [type=value_error, input]\n  see"
    on_a_gpu.setattr(FakeLLM, "refusal", ValueError(around))
    with pytest.raises(ConfigError) as caught:
        engine_of()
    assert str(caught.value) == "rollout.engine: vLLM does not start on student: 9 heads over 2 ranks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose heads are as wide as vLLM wants them."""
    folder = tmp_path_factory.mktemp("colocated")
    tiny_run(folder)
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        tiny_hf_model("llama", folder / name, num_layers=layers, seed=seed, std=0.1, hidden_size=128)
    return folder


def run_of(folder: Path, name: str, engine: str, tp: int = 1, **layout: Any) -> dict[str, Any]:
    """Two greedy steps. The evaluation writes one response, so with two engines one of them has no request."""
    values = {
        "run": {"dir": str(folder / name), "steps": 2, "micro_batch_size": 2, "device": "cpu", "seed": 5},
        "teacher": {"path": str(folder / "teacher"), "dtype": "fp32"},
        "student": {"path": str(folder / "student"), "dtype": "fp32"},
        "rollout": {
            "engine": engine,
            "vllm": {"enforce_eager": True, "tp": tp},
            "prompts": {"path": str(folder / "train.jsonl")},
            "prompts_per_step": 2,
            "responses_per_prompt": 2,
            "max_response_tokens": 24,
            "temperature": 0.0,
            "mismatch": {"every": 1},
        },
        "optimizer": {"lr": 1e-3, "warmup_fraction": 0.2, "eps": 1e-6},
        "eval": {"prompts": {"path": str(folder / "held_out.jsonl"), "limit": 1}, "max_response_tokens": 16},
        "logging": {"progress": False, "tensorboard": False},
    }
    return with_layout(changed(values, eval={"samples": 1, "every": 0}), **layout)


def train(values: dict[str, Any], ranks: int, *program: str) -> subprocess.CompletedProcess:
    """Run it in the environment that has vLLM; ended after `SECONDS`, with code -9."""
    folder = Path(values["run"]["dir"])
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [str(vllm_python()), *launcher, "-m", *(program or ("oprd_megatron.train",)), str(config)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, which have sessions of their own
        output, _ = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, -9, output)
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Path:
    """The run on transformers, in the same environment."""
    done = train(run_of(folder, "embedded", "hf"), 1)
    assert done.returncode == 0, done.stdout
    return folder / "embedded"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("ranks", "tp", "layout"),
    [
        (1, 1, {}),
        (2, 1, {"dp": 2}),
        (2, 1, {"teacher": {"tp": 2}, "student": {"pp": 2}}),
        (2, 2, {"teacher": {"pp": 2}, "student": {"tp": 2}}),
    ],
    ids=["one", "two-engines", "two-engines-student-pp", "one-engine-student-tp"],
)
def test_it_is_the_embedded_engines_run_colocated(
    folder: Path, embedded: Path, ranks: int, tp: int, layout: dict[str, Any]
) -> None:
    """Greedy text of two versions of the weights: losses, answers and the trained student are those of the run on
    transformers; the probe and every rollout's log-probability agree with the trainer's; it ends in peace."""
    run = folder / f"colocated-{ranks}-{tp}-{'-'.join(layout)}"
    done = train(run_of(folder, run.name, "vllm", tp, **layout), ranks)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout and "leaked" not in done.stdout
    records, wanted = train_records(run), train_records(embedded)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in wanted], rel=1e-4)
    for record in records:
        assert record["probe_difference"] < 1e-3 and record["mismatch"]["max_abs"] < 1e-3
    answers = [record.get("samples") for record in train_records(run, "eval")]
    assert answers[-1] and answers == [record.get("samples") for record in train_records(embedded, "eval")]
    found = student_tensors(run)
    for name, tensor in student_tensors(embedded).items():
        assert (tensor - found[name]).abs().max().item() <= 1e-5, name


@pytest.mark.vllm
@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2)], ids=["one", "one-engine-on-two"])
def test_a_lost_weight_is_named_colocated(folder: Path, ranks: int, tp: int) -> None:
    """One tensor that is not the trainer's is seen by the probe after that sync, and the run stops with its name. It leaves no
    name in shared memory that would stop the next."""
    before = set(SHARED_MEMORY.glob("*-cpushm_*"))
    values = run_of(folder, f"lost-{ranks}", "vllm", tp)
    del values["eval"]  # whose teacher's weights are sent to an engine too
    done = train(values, ranks, "tests.rollout.lose_a_weight", LOST)
    line = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert "weight sync of version 1" in line
    assert line.endswith(f"these weights have other checksums than the trainer's: {LOST}")
    assert done.returncode == (2 if ranks == 1 else 1)  # torchrun has a code of its own
    assert set(SHARED_MEMORY.glob("*-cpushm_*")) <= before
