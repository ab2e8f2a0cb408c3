"""Weight updates of a real vLLM server: it writes what a fresh engine writes, and a broken update is found."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from oprd_megatron.errors import UserError
from oprd_megatron.rollout.vllm.processes import ServerProcess
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY, BucketSender, SyncReport, TransferFolder
from oprd_megatron.vllm_worker import buckets
from tests.rollout.vllm_server import Http, running_server, smollm2, wait_until

pytestmark = pytest.mark.vllm

BUCKET_BYTES = 128 * 2**20
SECONDS = 120.0
LONG = list(range(1000, 1400))
PROMPTS = [[504, 3575, 282, 4649, 314], [1348, 253, 655], [33, 428, 6, 2], list(range(200, 260)), LONG]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests here."""
    with running_server(smollm2(), tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="session")
def original() -> dict[str, torch.Tensor]:
    """The model's own weights."""
    return load_file(smollm2() / "model.safetensors")


@pytest.fixture(scope="session")
def perturbed(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors changed by a tenth, the embedding and the norms too."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator)) for name, tensor in original.items()
    }


@pytest.fixture(scope="session")
def perturbed_dir(perturbed: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of them."""
    folder = tmp_path_factory.mktemp("perturbed") / "model"
    shutil.copytree(smollm2(), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(perturbed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def fresh(perturbed_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that was started on the perturbed weights. The last test takes it down."""
    with running_server(perturbed_dir, tmp_path_factory.mktemp("fresh")) as started:
        yield started


@pytest.fixture
def folder() -> Iterator[TransferFolder]:
    made = TransferFolder(SHARED_MEMORY)
    yield made
    made.close()


def sync(http: Http, folder: TransferFolder, version: int, weights: dict[str, torch.Tensor]) -> SyncReport:
    """One update."""
    return BucketSender([http], folder, BUCKET_BYTES, SECONDS).send(version, iter(weights.items()))


@torch.no_grad()
def model_scores(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, by transformers."""
    log_probs = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def texts(http: Http) -> list[list[int]]:
    """Greedy continuations of all prompts, the long one twice: the second time most of it is in the prefix cache."""
    return [http.greedy(prompt, 24) for prompt in [*PROMPTS, LONG]]


def test_updated_server_writes_what_a_fresh_engine_writes(
    server: ServerProcess,
    fresh: ServerProcess,
    folder: TransferFolder,
    original: dict[str, torch.Tensor],
    perturbed: dict[str, torch.Tensor],
) -> None:
    """Token for token, on prompts whose keys of the old weights were in the prefix cache."""
    http = Http(server.url)
    assert "lm_head.weight" not in original  # tied: the head has to follow the embedding
    before = texts(http)
    hits = http.cached_tokens()
    assert http.greedy(LONG, 24) == before[-1]
    assert http.cached_tokens() - hits >= 256  # of old weights, so an update that keeps them shows below
    assert sync(http, folder, 1, perturbed).failed == {}
    after, expected = texts(http), texts(Http(fresh.url))
    assert after == expected
    assert all(new != old for new, old in zip(after, before, strict=True))


def test_scores_of_an_updated_server_are_those_of_transformers(
    server: ServerProcess, folder: TransferFolder, perturbed: dict[str, torch.Tensor], perturbed_dir: Path
) -> None:
    """Log-probabilities of prompt tokens, fp32, within 1e-3 nats."""
    http = Http(server.url)
    assert sync(http, folder, 2, perturbed).failed == {}
    model = AutoModelForCausalLM.from_pretrained(perturbed_dir, dtype=torch.float32)
    for prompt in PROMPTS:
        assert (torch.tensor(http.score(prompt)) - model_scores(model, prompt)).abs().max() < 1e-3


class Tampering(Http):
    """Changes one bit of a tensor in its bucket, after it was written and before the server reads it."""

    def __init__(self, url: str, weight: str) -> None:
        super().__init__(url)
        self.weight = weight

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        entries = body["update_info"].get("tensors", []) if path == "/update_weights" and body else []
        if body and self.weight in [entry["name"] for entry in entries]:
            with Path(body["update_info"]["bucket"]).open("r+b") as file:
                header = json.loads(file.read(buckets.DATA_START)[8:])
                file.seek(buckets.DATA_START + header[self.weight]["data_offsets"][0])
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
        return super().post(path, body, seconds)


def test_tampered_bucket_is_found_and_the_next_update_mends_it(
    server: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor], perturbed: dict[str, torch.Tensor]
) -> None:
    """One bit in one tensor: the update fails and names it, the server is not resumed, and after a whole update it writes what
    it wrote with those weights before."""
    http = Http(server.url)
    assert sync(http, folder, 3, original).failed == {}
    expected = texts(http)
    weight = "model.layers.17.mlp.up_proj.weight"
    tampering = Tampering(server.url, weight)
    report = sync(tampering, folder, 4, perturbed)
    assert f"bytes of '{weight}' are not those that were sent" in report.failed[server.url]
    assert "/resume" not in tampering.commands
    assert http.get("/is_paused", SECONDS) == {"is_paused": True}
    assert http.get("/weight_info", SECONDS) == {"weight_version": "3"}
    assert sync(http, folder, 5, original).failed == {}
    assert texts(http) == expected


class Losing(Http):
    """One request for a bucket never arrives."""

    def post(self, path: str, body: dict | None, seconds: float) -> dict:
        if path == "/update_weights" and self.commands.count(path) == 1:
            self.commands.append(path)
            return {}
        return super().post(path, body, seconds)


def test_missing_and_unknown_tensors_are_found(
    server: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor]
) -> None:
    """Found are: a tensor that the trainer did not send, though all that it did send arrived (part of a fused layer, a whole
    layer); a bucket that got lost; a tensor that the model has no place for."""
    http = Http(server.url)
    for weight, message in (
        ("model.layers.3.self_attn.k_proj.weight", "layer 'model.layers.3.self_attn.qkv_proj' got 442368 of 552960"),
        ("model.embed_tokens.weight", "layer 'model.embed_tokens' got 0 of"),
    ):
        short = {name: tensor for name, tensor in original.items() if name != weight}
        assert message in sync(http, folder, 6, short).failed[server.url]
    assert (
        "tensors missing, the first is 'model.layers."
        in sync(Losing(server.url), folder, 7, original).failed[server.url]
    )
    more = original | {"model.layers.30.mlp.up_proj.weight": torch.zeros(1536, 576)}
    assert "layers.30" in sync(http, folder, 8, more).failed[server.url]
    assert sync(http, folder, 9, original).failed == {}


def test_another_trainer_can_update_after_one_that_was_killed(
    server: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor]
) -> None:
    """An update that was begun and never finished does not lock the server."""
    http = Http(server.url)
    assert sync(http, folder, 10, original).failed == {}
    expected = http.greedy(PROMPTS[0], 24)
    http.post("/pause?mode=wait", None, SECONDS)
    http.post("/start_weight_update", None, SECONDS)
    with pytest.raises(UserError, match="already active"):
        http.post("/start_weight_update", None, SECONDS)
    assert sync(http, folder, 11, original).failed == {}
    assert http.greedy(PROMPTS[0], 24) == expected


def test_the_engine_tells_checksums_of_what_it_has(
    server: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor]
) -> None:
    """Those that were sent; after a sync of another tensor, only that one differs."""
    http = Http(server.url)
    sender = BucketSender([http], folder, BUCKET_BYTES, SECONDS)
    assert sender.send(12, iter(original.items())).failed == {}
    sent = {entry.name: entry.crc32 for entry in sender.manifest}
    assert held(http) == sent
    weight = "model.layers.5.mlp.down_proj.weight"
    assert sync(http, folder, 13, original | {weight: original[weight] + 1e-3}).failed == {}
    assert {name for name, crc32 in held(http).items() if crc32 != sent[name]} == {weight}


def held(http: Http) -> dict[str, int]:
    """{tensor: checksum} of the server's only worker."""
    (worker,) = http.post("/collective_rpc", {"method": "held_weights"}, SECONDS)["results"]
    return worker["crc32"]


def test_two_buckets_exist_during_an_update(
    server: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor]
) -> None:
    """Files in the folder and their bytes, whenever a tensor is taken: never more than two buckets, and two at some time."""
    files, num_bytes = [], []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for item in original.items():
            found = [path.stat().st_size for path in folder.path.glob("*.safetensors*") if path.exists()]
            files.append(len(found))
            num_bytes.append(sum(found))
            yield item

    report = BucketSender([Http(server.url)], folder, BUCKET_BYTES, SECONDS).send(14, stream())
    assert report.failed == {}
    assert report.num_bytes == sum(tensor.nbytes for tensor in original.values()) > 4 * BUCKET_BYTES
    assert max(files) == 2
    assert max(num_bytes) <= 2 * (BUCKET_BYTES + buckets.DATA_START)


def other_model(family: str, folder: Path) -> Path:
    """A small random model with a head of its own, and a vocabulary that vLLM pads: with biases, or with experts."""
    shutil.copytree(smollm2(), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.manual_seed(5)
    sizes: dict[str, Any] = dict(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=49155, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        experts: dict[str, Any] = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "head_dim": 64,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_other_models_score_as_transformers_after_an_update(
    tmp_path: Path, folder: TransferFolder, family: str
) -> None:
    """A head that is not tied, biases, experts and a padded vocabulary all get the new weights; within 1e-3 nats."""
    model_dir = other_model(family, tmp_path / "model")
    weights = load_file(model_dir / "model.safetensors")
    assert "lm_head.weight" in weights
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: tensor * 1.5 + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()
    }
    with running_server(model_dir, tmp_path) as started:
        http = Http(started.url)
        old = http.score(LONG)
        assert sync(http, folder, 1, weights).failed == {}
        found = torch.tensor(http.score(LONG))
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = model_scores(model, LONG)
    assert (found - expected).abs().max() < 1e-3
    assert (torch.tensor(old) - expected).abs().max() > 1e-1


def test_half_loaded_engine_does_not_answer(
    fresh: ServerProcess, folder: TransferFolder, original: dict[str, torch.Tensor]
) -> None:
    """Text that is asked for after an update that failed half-way ends the engine, and with it the server, instead of coming
    from weights of two versions; no process of it stays."""
    http = Http(fresh.url)
    report = sync(Tampering(fresh.url, "model.layers.17.mlp.up_proj.weight"), folder, 1, original)
    assert fresh.url in report.failed
    http.post("/resume", None, SECONDS)
    with pytest.raises(UserError, match="HTTP 500"):
        http.greedy(PROMPTS[0], 4)
    wait_until(lambda: not fresh.is_alive, 30, "the server to end")
    with pytest.raises(ProcessLookupError):
        wait_until(lambda: os.killpg(fresh.pid, 0), 30, "the server's processes to end")


def test_no_process_outlives_a_killed_server(perturbed_dir: Path, tmp_path: Path) -> None:
    """kill -9 of the server alone: its engine and workers end too, and free memory and port."""
    with running_server(perturbed_dir, tmp_path) as started:
        os.kill(started.pid, signal.SIGKILL)
        wait_until(lambda: not started.is_alive, 30, "the server to end")
        with pytest.raises(ProcessLookupError):
            wait_until(lambda: os.killpg(started.pid, 0), 30, "the server's processes to end")
