"""Rollout servers by themselves, for a run on other GPUs or machines: `oprd rollout serve`."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from oprd_megatron.config import RunConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.vllm.processes import ServerProcess, last_word, start_server, wait_ready


class _Asked(Exception):
    """Ctrl-C or SIGTERM."""


def serve(config: RunConfig, weights: Path, host: str, port: int, count: int, log_dir: Path) -> None:
    """Start servers for a run's student, say where they are, and keep them until Ctrl-C or SIGTERM, or until one ends.

    Args:
        config: the run.
        weights: Hugging Face directory of the student; a run's first sync replaces what it holds.
        host: address to listen on; other than loopback, anyone who reaches it can replace the weights.
        port: of the first server; the others follow.
        count: servers. On GPUs each has `rollout.vllm.tp` of its own, in order.
        log_dir: for their output, one file each.

    Raises:
        UserError: too few GPUs, a server does not start, or one ends.
    """
    tp = config.rollout.vllm.tp
    if torch.cuda.is_available() and count * tp > torch.cuda.device_count():
        raise UserError(
            f"{count} servers x rollout.vllm.tp {tp} = {count * tp} GPUs, but {torch.cuda.device_count()} are here; start fewer"
        )
    servers: list[ServerProcess] = []
    try:
        with _signals():
            for index in range(count):
                servers.append(
                    start_server(
                        weights,
                        config.rollout.vllm,
                        config.rollout.server,
                        host,
                        port + index,
                        log_dir / f"server-{port + index}.log",
                        config.student.dtype,
                        None,
                        config.run.seed,
                        range(index * tp, (index + 1) * tp) if torch.cuda.is_available() else None,
                    )
                )
            print(f"starting {count} vLLM server(s), logs in {log_dir}", flush=True)
            wait_ready(servers, config.rollout.server.ready_seconds)
            print(f"rollout.server.urls: [{', '.join(server.url for server in servers)}]", flush=True)
            _until_one_ends(servers)
    except _Asked:
        print("stopping", flush=True)
    finally:
        for server in servers:
            server.stop()


def _until_one_ends(servers: list[ServerProcess]) -> None:
    while True:
        for server in servers:
            if not server.is_alive:
                raise UserError(f"{server.url}: the vLLM server ended; {server.log} says: {last_word(server.log)}")
        time.sleep(0.5)


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block."""

    def ask(number: int, frame: FrameType | None) -> None:
        raise _Asked

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
