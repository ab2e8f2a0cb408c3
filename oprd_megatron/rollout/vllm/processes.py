"""vLLM servers as processes of this machine.

A server is started in a process group of its own, and watches the process that started it: when that ends, however it does, the
whole group ends (`oprd_megatron.vllm_worker.watch`). Its environment is this process's without what torchrun put there.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

import oprd_megatron
from oprd_megatron.config.rollout import ServerConfig, VLLMConfig
from oprd_megatron.errors import UserError
from oprd_megatron.vllm_worker.buckets import BACKEND

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""vLLM's names of a student's dtypes."""

WORKER = "oprd_megatron.vllm_worker.worker.WorkerExtension"

STOP_SECONDS = 10.0
"""From SIGTERM to SIGKILL."""

KILL_SECONDS = 2.0
"""Longest wait for the processes to be gone after SIGKILL; where nobody reaps orphans they never are."""

LOG_BYTES = 2**17
"""Of a log's end, searched for the reason of a server's end."""

KV_CACHE_GIB = "1"
"""Cache of a server on CPU where VLLM_CPU_KVCACHE_SPACE is not set; vLLM's own is most of the machine's memory."""

NOT_PASSED_ON = re.compile(r"(TORCHELASTIC_|GROUP_|ROLE_|LOCAL_|MASTER_).*|RANK|WORLD_SIZE|OMP_NUM_THREADS|PYTHONPATH")
"""Variables that would tell a server that it is a rank of the run, or make it import the run's packages."""


class ServerProcess:
    """A server that this process started.

    Attributes:
        url: http://host:port.
        log: its output.
        pid: its process, which leads a process group of its own.
    """

    def __init__(self, url: str, log: Path, process: subprocess.Popen) -> None:
        self.url, self.log, self.pid = url, log, process.pid
        self._process = process
        self._is_stopped = False

    @property
    def is_alive(self) -> bool:
        """Whether the server's process runs; it may not answer yet."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server and all its processes: SIGTERM, and after `STOP_SECONDS` SIGKILL. Nothing if that was done before."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            deadline = time.monotonic() + seconds
            _signal_group(self.pid, number)
            while _signal_group(self.pid, 0) and time.monotonic() < deadline:  # 0 only asks
                self._process.poll()
                time.sleep(0.02)
        self._process.wait(STOP_SECONDS)


def start_server(
    model_dir: Path,
    vllm: VLLMConfig,
    server: ServerConfig,
    host: str,
    port: int,
    log: Path,
    dtype: str,
    max_model_len: int | None,
    seed: int,
    devices: Sequence[int] | None = None,
) -> ServerProcess:
    """Start a server; it is not ready yet (`wait_ready`).

    Args:
        model_dir: Hugging Face directory of the student.
        vllm: `rollout.vllm`.
        server: `rollout.server`; its `python` runs the server.
        host: address to listen on.
        port: port to listen on.
        log: file for its output, overwritten.
        dtype: fp32 or bf16.
        max_model_len: context, where `vllm.max_model_len` does not say; None for the model's own.
        seed: vLLM's.
        devices: GPUs that it sees; None for all.

    Raises:
        UserError: the port is taken, or the Python is missing.
    """
    url = f"http://{host}:{port}"
    _check_port(host, port)
    log = log.absolute()
    log.parent.mkdir(parents=True, exist_ok=True)
    python = str(server.python or sys.executable)
    options = {
        "model": str(model_dir),
        "served_model_name": str(model_dir),
        "host": host,
        "port": port,
        "disable_uvicorn_access_log": True,
        **engine_options(vllm, dtype, max_model_len, seed, uses_nccl(server)),
    }
    program = [python, "-m", "oprd_megatron.vllm_worker.launch", str(os.getpid()), *as_arguments(options)]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(log.parent, devices),
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(
            f"rollout.server.python: {python} cannot be started ({error.strerror}); name the Python of an environment with vLLM"
        ) from None
    return ServerProcess(url, log, process)


def wait_ready(servers: Sequence[ServerProcess], seconds: float) -> None:
    """Wait until all servers answer.

    Raises:
        UserError: one has died or does not answer in time; the message ends with what its log says.
    """
    deadline = time.monotonic() + seconds
    for server in servers:
        while not _is_healthy(server.url):
            if not server.is_alive:
                said = last_word(server.log)
                advice = "; name the Python of an environment with vLLM in rollout.server.python" * ("'vllm'" in said)
                raise UserError(f"{server.url}: the vLLM server ended at its start; {server.log} says: {said}{advice}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{server.url}: the vLLM server is not ready after {seconds:g} s (rollout.server.ready_seconds); "
                    f"{server.log} says: {last_word(server.log)}"
                )
            time.sleep(0.25)


def uses_nccl(server: ServerConfig) -> bool:
    """Whether weights travel between GPUs."""
    return server.transfer == "nccl" or (server.transfer == "auto" and torch.cuda.is_available())


def engine_options(
    vllm: VLLMConfig, dtype: str, max_model_len: int | None, seed: int, nccl: bool = False
) -> dict[str, Any]:
    """vLLM's engine options, by its own names; `vllm.args` overrules."""
    options = {
        "dtype": DTYPES[dtype],
        "seed": seed,
        "tensor_parallel_size": vllm.tp,
        "max_model_len": vllm.max_model_len or max_model_len,
        "enforce_eager": vllm.enforce_eager or None,
        "cudagraph_capture_sizes": vllm.cuda_graph_sizes or None,
        "gpu_memory_utilization": vllm.gpu_memory_utilization if torch.cuda.is_available() else None,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the directory's sampling defaults
        "weight_transfer_config": {"backend": "nccl" if nccl else BACKEND},
        "worker_extension_cls": WORKER,
    }
    return {name: value for name, value in (options | vllm.args).items() if value is not None}


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as vLLM's command line takes them: true is --name, false --no-name, a list several words, a dict JSON."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def last_word(log: Path) -> str:
    """The line of a server's log that says why it ended: the last error that is its own root cause, else the last line."""
    lines = [re.sub(r"^(\(\S+ pid=\d+\) )?(\w+ \d\d-\d\d [\d:]+ \[\S+\] )?", "", line).strip() for line in _lines(log)]
    lines = [line for line in lines if line]
    errors = [
        line for line in lines if re.match(r"[\w.]*(Error|Exception|error)\b: ", line) and "root cause" not in line
    ]
    return (errors or lines or ["nothing"])[-1][:300]


def _lines(log: Path) -> list[str]:
    """Of the log's end."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace").splitlines()


def _environment(folder: Path, devices: Sequence[int] | None) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not NOT_PASSED_ON.fullmatch(name)}
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", KV_CACHE_GIB)
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    env["PYTHONPATH"] = str(_only_this_package(folder))
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    return env


def _only_this_package(folder: Path) -> Path:
    """A directory to import this package from, without what is installed beside it: the server's environment has its own."""
    path = folder / "vllm_imports"
    path.mkdir(exist_ok=True)
    link, package = path / "oprd_megatron", Path(oprd_megatron.__file__).parent.resolve()
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(package)
    return path


def _check_port(host: str, port: int) -> None:
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError as error:
            raise UserError(
                f"http://{host}:{port}: a vLLM server cannot listen there ({error.strerror}); set another rollout.server.port, "
                "or name the server that runs there in rollout.server.urls"
            ) from None


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _signal_group(group: int, number: int) -> bool:
    """Whether there was a process to send it to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
