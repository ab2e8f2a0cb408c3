"""vLLM servers as processes: their command, how they start and end, what is said when they do not. The server is a stand-in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from oprd_megatron.config.rollout import ServerConfig, VLLMConfig
from oprd_megatron.errors import UserError
from oprd_megatron.rollout.vllm import processes
from oprd_megatron.rollout.vllm.processes import ServerProcess, as_arguments, engine_options, start_server, wait_ready
from tests.rollout.vllm_server import free_port, wait_until

STAND_IN = """
import http.server, json, os, signal, subprocess, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
kind = options["--model"]
if kind == "dies":
    print("(EngineCore pid=7) ERROR 11-22 13:32:10 [core.py:15] ValueError: no such model")
    print("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    sys.exit(1)
if kind == "silent":
    print("INFO 11-22 13:32:10 [core.py:15] loading", flush=True)
    time.sleep(600)
if kind == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        said = {"child": child.pid, "arguments": sys.argv[1:], "environment": dict(os.environ), "path": sys.path}
        self.wfile.write(json.dumps(said).encode())
    def log_message(self, *args):
        pass
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


def started(folder: Path, kind: str, **more: object) -> ServerProcess:
    """A stand-in for vLLM that answers /health with what it was given, or fails as `kind` says."""
    module = folder / "vllm_imports/vllm/entrypoints/openai/api_server.py"
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(textwrap.dedent(STAND_IN))
    port = more.pop("port", None) or free_port()
    return start_server(
        Path(kind), VLLMConfig(), ServerConfig(), "127.0.0.1", port, folder / "log", "fp32", 64, 3, **more  # type: ignore[arg-type]
    )  # fmt: skip


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_server_gets_its_options_and_not_the_runs_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command holds what vLLM needs; nothing of torchrun's and of the run's import path reaches the server."""
    for name, value in {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "h",
        "OMP_NUM_THREADS": "1",
        "KEPT": "yes",
    }.items():
        monkeypatch.setenv(name, value)
    server = started(tmp_path, "healthy", devices=[2, 3])
    try:
        wait_ready([server], 30)
        said = httpx.get(f"{server.url}/health").json()
    finally:
        server.stop()
    joined = " ".join(said["arguments"])
    for expected in (
        "--model healthy", "--served-model-name healthy", "--host 127.0.0.1", "--dtype float32", "--max-model-len 64",
        "--seed 3", "--tensor-parallel-size 1", "--logprobs-mode processed_logprobs", "--enable-prefix-caching",
        "--generation-config vllm", "--worker-extension-cls oprd_megatron.vllm_worker.worker.WorkerExtension",
        '--weight-transfer-config {"backend": "oprd_buckets"}',
    ):  # fmt: skip
        assert expected in joined
    environment = said["environment"]
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS"} & environment.keys()
    assert (environment["KEPT"], environment["VLLM_SERVER_DEV_MODE"]) == ("yes", "1")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert sorted(path.name for path in Path(environment["PYTHONPATH"]).iterdir()) == ["oprd_megatron", "vllm"]


def test_user_options_overrule_and_take_every_form() -> None:
    """vllm.args comes last; booleans, lists and dicts become what vLLM's command line reads."""
    vllm = VLLMConfig(
        enforce_eager=True,
        cuda_graph_sizes=[1, 8],
        args={"enable_prefix_caching": False, "compilation_config": {"level": 0}},
    )
    options = engine_options(vllm, "bf16", None, 0)
    assert "max_model_len" not in options
    joined = " ".join(as_arguments(options))
    for expected in (
        "--dtype bfloat16", "--enforce-eager", "--cudagraph-capture-sizes 1 8", "--no-enable-prefix-caching",
        '--compilation-config {"level": 0}',
    ):  # fmt: skip
        assert expected in joined


@pytest.mark.parametrize("kind", ["healthy", "stubborn"])
def test_stop_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also a server that ignores SIGTERM, and the server's own children."""
    monkeypatch.setattr(processes, "STOP_SECONDS", 1.0)
    server = started(tmp_path, kind)
    wait_ready([server], 30)
    child = httpx.get(f"{server.url}/health").json()["child"]
    assert server.is_alive
    assert is_running(child)
    server.stop()
    server.stop()  # nothing more
    assert not server.is_alive
    assert not is_running(child)


def test_server_dies_with_a_killed_owner(tmp_path: Path) -> None:
    """kill -9 of the process that started it ends server and children."""
    program = f"""
import time
from pathlib import Path
from tests.rollout.test_vllm_processes import started
from oprd_megatron.rollout.vllm.processes import wait_ready
server = started(Path({str(tmp_path)!r}), "healthy")
wait_ready([server], 30)
print(server.pid, server.url, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert owner.stdout is not None
    pid, url = owner.stdout.readline().split()
    child = httpx.get(f"{url}/health").json()["child"]
    assert is_running(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    wait_until(lambda: not is_running(int(pid)) and not is_running(child), 15, "the server to end")


def test_dead_server_is_one_line_with_its_reason(tmp_path: Path) -> None:
    """The root cause of the log is told, not the error that follows from it."""
    server = started(tmp_path, "dies")
    with pytest.raises(UserError, match=r"ended at its start; .*log says: ValueError: no such model") as refused:
        wait_ready([server], 30)
    assert "\n" not in str(refused.value)
    server.stop()


def test_server_that_does_not_answer_has_a_time_limit(tmp_path: Path) -> None:
    """The message names the setting, the url and the log's last line."""
    server = started(tmp_path, "silent")
    begun = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"not ready after 2 s \(rollout.server.ready_seconds\); .* says: loading"):
            wait_ready([server], 2)
    finally:
        server.stop()
    assert time.monotonic() - begun < 20


def test_busy_port_and_missing_python_are_found_before_the_start(tmp_path: Path) -> None:
    """One line each, and nothing is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"127.0.0.1:{port}: a vLLM server cannot listen there .*rollout.server.port"
        ):
            started(tmp_path, "healthy", port=port)
    missing = ServerConfig(python=Path("/nowhere/python"))
    with pytest.raises(UserError, match=r"rollout.server.python: /nowhere/python cannot be started \(No such file"):
        start_server(Path("m"), VLLMConfig(), missing, "127.0.0.1", free_port(), tmp_path / "log", "fp32", None, 0)


SERVE = """
import sys
from pathlib import Path
from oprd_megatron.config import load_config
from oprd_megatron.rollout.vllm.serve import serve
serve(load_config(Path(sys.argv[1]), []), Path("healthy"), "127.0.0.1", int(sys.argv[2]), 1, Path(sys.argv[3]))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, None])
def test_serve_says_urls_and_stops_its_servers(tmp_path: Path, end: signal.Signals | None) -> None:
    """A signal ends `serve` and its servers; the end of a server ends it with that server's name."""
    started(tmp_path, "dies").stop()  # puts the stand-in where the servers look
    port = free_port()
    config = Path(__file__).parents[2] / "examples/quickstart.yaml"
    program = [sys.executable, "-c", SERVE, str(config), str(port), str(tmp_path)]
    serving = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    assert serving.stdout.readline().startswith("starting 1 vLLM server(s), logs in ")
    url = f"http://127.0.0.1:{port}"
    assert serving.stdout.readline() == f"rollout.server.urls: [{url}]\n"
    said = httpx.get(f"{url}/health").json()
    server = int(said["environment"]["OPRD_VLLM_SERVER_PID"])
    if end is None:
        os.kill(server, signal.SIGKILL)
    else:
        serving.send_signal(end)
    _, errors = serving.communicate(timeout=30)
    assert (serving.returncode == 0) == (end is not None)
    assert end is not None or f"{url}: the vLLM server ended" in errors
    assert not is_running(server)
    assert not is_running(said["child"])
