"""A teacher service: its answers are the teacher's states, and what it must not do it refuses in one line."""

from __future__ import annotations

import contextlib
import http.client
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.bridge.artefact import BridgeInfo, Fingerprints, read_info, write_bridge
from oprd_megatron.bridge.fingerprint import model_fingerprint, tokenizer_fingerprint
from oprd_megatron.config import parse_config
from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.errors import DataError, UserError
from oprd_megatron.library import (
    InProcessTeacher,
    RemoteTeacher,
    StatesInBatch,
    TeacherClient,
    TokenBatch,
    attach,
    megatron_batch,
    representation_step,
)
from oprd_megatron.library.teacher_service.frames import PARTS, Question
from oprd_megatron.library.teacher_service.scoring import Scorer
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.rollout.tokenizer import load_tokenizer
from tests.library.test_attach import SIZE, WIDTH, get_inputs, items
from tests.library.user_models import PLATFORM, Layout, architecture_of, chunks_of, gradients_of, trained
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import tiny_values

RANK, LAYERS = 4, {1: 2, 2: 3, 4: 5}
SEQUENCES = [np.array([9, 8, 7]), np.arange(70, 50, -1), np.arange(3, 40)]
POSITIONS = [np.array([1, 2]), np.array([], dtype=np.int64), np.array([0, 5, 36])]


@dataclass(frozen=True)
class Files:
    """Models of different widths, and a bridge between them (random, which a service does not mind)."""

    folder: Path
    teacher: Path
    student: Path
    bridge: Path

    @property
    def distill(self) -> DistillConfig:
        return DistillConfig(bridge=self.bridge, layer_map=LAYERS, positions="all", coefficient=50.0, wire="fp32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("service")
    teacher, student = folder / "teacher", folder / "student"
    tiny_hf_model("qwen3", teacher, num_layers=5, hidden_size=48, vocab_size=288, std=0.1, seed=1)
    tiny_hf_model("llama", student, num_layers=4, vocab_size=256, std=0.1, seed=2)
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    bridge = Bridge(
        RANK, {t: draw(48) for t in LAYERS.values()}, {t: draw(RANK, 48) for t in LAYERS.values()},
        {s: {"projection": draw(RANK, 32)} for s in LAYERS},
    )  # fmt: skip
    models = {
        name: model_fingerprint(p, read_architecture(p)) for name, p in (("teacher", teacher), ("student", student))
    }
    tokenizer = tokenizer_fingerprint(load_tokenizer(teacher))
    info = BridgeInfo(
        projector="linear", rank=RANK, layer_map=list(LAYERS.items()), fit={}, held_out=None, ranks={},
        fingerprints=Fingerprints(**models, teacher_tokenizer=tokenizer, student_tokenizer=tokenizer),
    )  # fmt: skip
    write_bridge(folder / "bridge.safetensors", bridge, info)
    return Files(folder, teacher, student, folder / "bridge.safetensors")


@contextlib.contextmanager
def served(files: Files, *settings: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A service as a user starts it: (its url, its process)."""
    values = tiny_values(files.folder)
    config = files.folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "oprd_megatron.cli", "teacher", "serve", str(config), *settings, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"teacher service on (http://\S+):", line):
                yield found[1], process
                return
        raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def service(files: Files) -> Iterator[str]:
    """Two ranks, tensor parallel, projecting."""
    with served(files, "teacher.parallel.tp=2", f"distill.bridge={files.bridge}", "distill.wire=fp32") as (url, _):
        yield url


def states_by_transformers(files: Files, layer: int) -> torch.Tensor:
    """[P, 48] of SEQUENCES at POSITIONS."""
    model = AutoModelForCausalLM.from_pretrained(files.teacher, dtype=torch.float32)
    with torch.no_grad():
        found = [
            model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states[layer][
                0, torch.from_numpy(where)
            ]
            for ids, where in zip(SEQUENCES, POSITIONS, strict=True)
        ]
    return torch.cat(found)


def test_answers_are_projected_states(files: Files, service: str) -> None:
    """P_T (h_T - mu) of transformers' hidden states, R numbers each, in order; small frames change nothing."""
    client = TeacherClient(service, expected=files.teacher)
    assert client.info.width == RANK and client.info.layers == [2, 3, 5]
    found = client.states(SEQUENCES, POSITIONS, [5, 2])
    client.info = client.info.model_copy(update={"max_frame_bytes": 700})
    in_parts = client.states(SEQUENCES, POSITIONS, [5, 2])
    bridge = {name: tensor for name, tensor in load_file(files.bridge).items() if name.startswith("teacher")}
    for layer in (2, 5):
        states = states_by_transformers(files, layer)
        expected = (states - bridge[f"teacher.{layer}.mean"]) @ bridge[f"teacher.{layer}.projection"].T
        torch.testing.assert_close(found[layer], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(in_parts[layer], found[layer], rtol=1e-5, atol=1e-5)
    assert all(rows.shape == (0, RANK) for rows in client.states(SEQUENCES, [POSITIONS[1]] * 3, [2]).values())


BAD = {
    "a layer that is not there": ({"layers": [4]}, "teacher layer 4 cannot be had here, only 2, 3, 5"),
    "a foreign token": (
        {"sequences": [np.array([1, 288])]},
        "token id 288 is not one of the teacher's 288: another tokenizer",
    ),
    "too long": (
        {"sequences": [np.zeros(513, dtype=np.int64)]},
        "sequence 0 has 513 tokens, the teacher's context is 512",
    ),
    "a position outside": (
        {"positions": [np.array([1, 2])]},
        "positions of sequence 0 are not ascending within its 2 tokens",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_the_teacher_has_not_is_one_line(service: str, bad: str) -> None:
    """Refused by the service itself, whatever a client checks."""
    changes, line = BAD[bad]
    question = Question(**{"sequences": [np.array([1, 2])], "positions": [np.array([1])], "layers": [2], **changes})
    reply = httpx.post(f"{service}/v1/states", content=question.pack())
    assert (reply.status_code, reply.json()["error"]) == (400, line)


def test_any_frame_is_read_or_refused(service: str) -> None:
    """Numbers at random, huge and negative ones too: never an error of another kind, never a question that is not whole."""
    info, rng, read = TeacherClient(service).info, np.random.default_rng(0), 0
    for _ in range(500):
        frame = Question([np.array([1, 2, 3]), np.array([4])], [np.array([0, 2]), np.array([0])], [2]).parts()
        name = str(rng.choice(PARTS))
        values = frame[name].clone()
        values[rng.integers(len(values))] = int(rng.choice([-1, 0, 1, 2, 3, 5, 288, 2**62, 2**63 - 1]))
        frame[name] = values[: rng.integers(len(values) + 1)] if rng.random() < 0.3 else values
        try:
            question = Question.unpack(save(frame), info)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            read += 1
            assert (
                sum(map(len, question.sequences)) == 4
                and question.num_states == 3
                and question.layers in ([2], [3], [5])
            )
    assert read > 20


def test_only_safetensors_of_bounded_length_are_read(service: str, tmp_path: Path) -> None:
    """A pickle is not opened; a frame that is too long, or does not say how long it is, is not read."""

    class Opened:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    for body in (pickle.dumps(Opened()), b"", b"\xff" * 64, save({"ids": torch.ones(2)})):
        reply = httpx.post(f"{service}/v1/states", content=body)
        assert reply.status_code == 400 and "\n" not in reply.json()["error"]
    assert not (tmp_path / "opened").exists()
    connection = http.client.HTTPConnection(service.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/states")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413 and b"more than the" in answer.read()
    assert httpx.post(f"{service}/v1/states", content=iter([b"12"])).status_code == 411
    assert httpx.get(f"{service}/elsewhere").status_code == 404
    assert TeacherClient(service).states(SEQUENCES, POSITIONS, [2])[2].shape == (5, RANK)  # it is still well


def test_a_client_refuses_what_it_does_not_expect(files: Files, service: str) -> None:
    """Another teacher, a bridge that the service has not, a layer that the bridge has not; nobody there."""
    with pytest.raises(UserError, match=r"has the teacher .*, which differs from .*student in its family"):
        TeacherClient(service, expected=files.student)
    remote = RemoteTeacher.at(service)
    with pytest.raises(UserError, match=r"projects through a bridge, distill\.bridge is None"):
        remote.check(DistillConfig(), [])
    other = files.distill.model_copy(update={"final_state": "pre_norm"})
    with pytest.raises(UserError, match=r"serves final_state post_norm, but distill\.final_state is pre_norm"):
        remote.check(other, [])
    with pytest.raises(UserError, match="is the teacher service up"):
        TeacherClient("http://127.0.0.1:9")
    assert read_info(files.bridge).sha256 == remote.client.info.bridge


def step_with(files: Files, kind: str, url: str, layout: Layout) -> dict[str, Any]:
    """One step of a loop without a loss of its own, taught by each kind of teacher."""
    read, batch = get_inputs(layout), megatron_batch
    with PLATFORM.scope():
        teacher: Any = RemoteTeacher.at(url, expected=files.teacher) if kind == "remote" else None
        if kind == "in_process":
            teacher = InProcessTeacher.load(files.teacher, ParallelConfig(tp=2), platform=PLATFORM, dtype="fp32")
        if kind == "in_batch":
            client, teacher = TeacherClient(url), StatesInBatch(num_layers=5, width=48)

            def batch(item: dict[str, Any]) -> TokenBatch:
                plain = megatron_batch(item)
                states = client.states(plain.sequences, plain.positions(files.distill), sorted(LAYERS.values()))
                return replace(plain, states=states)

        bare = chunks_of(architecture_of(files.student), files.student, layout, per_token=False)
        wrapped = trained(bare)
        oprd = attach(wrapped, teacher, files.distill)
        wrapped[0].zero_grad_buffer()
        oprd.around(get_forward_backward_func(), batch)(
            forward_step_func=representation_step(oprd, lambda iterator: read(iterator)[0]),
            data_iterator=iter(items()), model=wrapped[0], num_microbatches=len(items()), seq_length=SIZE,
            micro_batch_size=WIDTH, forward_only=False,
        )  # fmt: skip
        assert oprd.report is not None
        return gradients_of(bare, architecture_of(files.student)) | {"loss": oprd.report.loss}


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(tp=2)], ids=["pp2", "tp2"])
def test_every_teacher_gives_the_same_gradients(files: Files, service: str, layout: Layout) -> None:
    """In process, over the wire, or in the batch: a student on two ranks learns the same."""
    ranks = {
        kind: run_ranks(2, step_with, files, kind, service, layout) for kind in ("in_process", "remote", "in_batch")
    }
    for kind in ("remote", "in_batch"):
        for mine, expected in zip(ranks[kind], ranks["in_process"], strict=True):
            assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-6) and expected["loss"] > 0.1
            for name, gradient in expected["gradients"].items():
                assert (mine["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def scored(files: Files) -> dict[int, torch.Tensor]:
    """States as they are, of a teacher on two stages."""
    values = tiny_values(files.folder)
    values["teacher"]["parallel"] = {"pp": 2}
    with PLATFORM.scope():
        scorer = Scorer(parse_config(values, "test"), PLATFORM, 2**20)
        scorer.teacher = replace(scorer.teacher, micro_batch_tokens=25)  # the longest sequence goes first, by itself
        return scorer.score(Question(SEQUENCES, POSITIONS, [1, 5]))


def test_states_as_they_are_from_two_stages(files: Files) -> None:
    """Without a bridge any layer can be had, whichever stage holds it; in the question's order, whatever the teacher's."""
    first, second = run_ranks(2, scored, files)
    assert second == {}
    for layer in (1, 5):
        torch.testing.assert_close(first[layer], states_by_transformers(files, layer), rtol=1e-5, atol=1e-5)


def foreign_bridge(files: Files) -> str:
    """What is said to a bridge of another teacher."""
    values = tiny_values(files.folder)
    values["teacher"]["path"], values["distill"] = str(files.student), {"bridge": str(files.bridge)}
    with pytest.raises(UserError) as found, PLATFORM.scope():
        Scorer(parse_config(values, "test"), PLATFORM, 2**20)
    return str(found.value)


def test_a_foreign_bridge_is_refused(files: Files) -> None:
    """By the fingerprint of the teacher that it was fitted for."""
    (line,) = run_ranks(1, foreign_bridge, files)
    assert re.match(r"distill\.bridge: .* was fitted for teacher .* differs in its family", line)


def test_it_stops_on_sigterm(files: Files) -> None:
    """After the question at hand, with a word and exit code 0."""
    with served(files) as (url, process):
        assert TeacherClient(url).info.bridge is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert process.stdout is not None and process.stdout.read() == "stopped\n"
