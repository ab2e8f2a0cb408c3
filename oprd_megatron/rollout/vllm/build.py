"""From the config to an engine on vLLM servers."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedTokenizerBase

from checkpoints_conversion import Architecture
from checkpoints_conversion.interop import is_megatron
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.models import DTYPES
from oprd_megatron.rollout.hf_engine import eos_ids
from oprd_megatron.rollout.vllm.client import ServerClient, Vocabulary
from oprd_megatron.rollout.vllm.colocated import ColocatedEngine
from oprd_megatron.rollout.vllm.processes import ServerProcess, start_server, uses_nccl, wait_ready
from oprd_megatron.rollout.vllm.server_checks import check_servers
from oprd_megatron.rollout.vllm.server_engine import ServerEngine, WeightSender
from oprd_megatron.rollout.vllm.weight_transfer import SHARED_MEMORY, BucketSender, TransferFolder

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Student:
    """Whose text servers write.

    Attributes:
        config: the run.
        path: Hugging Face directory.
        architecture: of the model there.
        tokenizer: from there.
        context: tokens of the longest prompt with its response.
    """

    config: RunConfig
    path: Path
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    context: int

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids that the model can write."""
        return Vocabulary(self.architecture.vocab_size, tuple(eos_ids(self.path, self.tokenizer.eos_token_id)))

    def clients(self, urls: Sequence[str]) -> list[ServerClient]:
        """One a server."""
        return [ServerClient(url, self.vocabulary) for url in urls]


def refuse_megatron(engine: str, path: Path) -> None:
    """vLLM reads no Megatron checkpoint.

    Raises:
        ConfigError: the engine is one of vLLM's, and the student's path holds one.
    """
    if engine in ("vllm", "vllm_server") and is_megatron(path):
        raise ConfigError(
            f"rollout.engine: {engine} starts from a Hugging Face directory, but the student {path} is a Megatron checkpoint; "
            f"write one with `oprd convert export {path} DIRECTORY`, or use rollout.engine: hf"
        )


def start_servers(student: Student) -> list[ServerProcess]:
    """Start the servers that a run does not name; `make_server_engine` waits for them. Those that it names are looked at.

    Raises:
        ConfigError: there are too few GPUs beside those of the ranks.
        UserError: a port is taken, Python is missing, or a named server is not there or not for this student.
    """
    config, section = student.config, student.config.rollout
    if section.server.urls:
        _check_running(student)
        return []
    tp, first = section.vllm.tp, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there, needed = torch.cuda.device_count(), first + section.server.start * tp
    if torch.cuda.is_available() and needed > there:
        raise ConfigError(
            f"rollout.server.start: {section.server.start} servers on {tp} GPUs each beside {first} ranks need {needed} GPUs, "
            f"and {there} are here; start fewer ranks or servers, or name servers elsewhere in rollout.server.urls"
        )
    servers: list[ServerProcess] = []
    try:
        for number in range(section.server.start):
            port, gpus = section.server.port + number, range(first + number * tp, first + (number + 1) * tp)
            servers.append(
                start_server(
                    student.path, section.vllm, section.server, HOST, port, config.run.dir / "logs" / f"vllm-{port}.log",
                    config.student.dtype, student.context, config.run.seed, gpus if torch.cuda.is_available() else None,
                )
            )  # fmt: skip
    except BaseException:
        for server in servers:
            server.stop()
        raise
    return servers


def make_server_engine(student: Student, started: Sequence[ServerProcess]) -> ServerEngine:
    """An engine on the run's servers, without weights yet.

    Args:
        student: whose.
        started: from `start_servers`; they end with the engine.

    Raises:
        UserError: a server does not get ready, or is not for this student.
    """
    section = student.config.rollout
    try:
        wait_ready(started, section.server.ready_seconds)
        clients = student.clients([server.url for server in started] or section.server.urls)
        check_servers(clients, student.path, student.tokenizer, student.context)
        return ServerEngine(clients, section, _sender(student, clients), started)
    except BaseException:
        for server in started:
            server.stop()
        raise


def make_colocated(student: Student) -> ColocatedEngine:
    """An engine in this process and those of its group, without weights yet. Collective over the world.

    Raises:
        ConfigError: vLLM is not installed here, or groups do not fit the ranks.
    """
    config = student.config
    return ColocatedEngine(
        student.path, config.rollout, config.student.dtype, student.vocabulary, student.context, config.run.seed
    )


def _check_running(student: Student) -> None:
    clients = student.clients(student.config.rollout.server.urls)
    try:
        check_servers(clients, student.path, student.tokenizer, student.context)
    finally:
        for client in clients:
            client.close()


def _sender(student: Student, clients: Sequence[ServerClient]) -> WeightSender:
    section = student.config.rollout.server
    if uses_nccl(section):
        from oprd_megatron.rollout.vllm.nccl_transfer import NCCLSender

        dtype, address = DTYPES[student.config.student.dtype], socket.gethostbyname(socket.gethostname())
        return NCCLSender(clients, student.architecture, dtype, address, _free_port(), section.request_seconds)
    here = all(urlsplit(client.url).hostname in (HOST, "localhost", "::1") for client in clients)
    in_memory = section.transfer == "shm" or (section.transfer == "auto" and here)
    folder = SHARED_MEMORY if in_memory else section.transfer_dir or student.config.run.dir / "weights"
    return BucketSender(clients, TransferFolder(folder), section.bucket_bytes, section.request_seconds)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
