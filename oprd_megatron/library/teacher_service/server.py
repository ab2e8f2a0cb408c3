"""The service: rank 0 listens, all ranks score.

Requests are read by threads; one after the other they are told to the other ranks and scored by the main thread, because
scoring is collective. When nobody asks, rank 0 says so every few seconds, so that no rank waits longer than a process group
lets it. SIGTERM or Ctrl-C ends the service after the question at hand.
"""

from __future__ import annotations

import json
import queue
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch.distributed as dist

from oprd_megatron.config import RunConfig
from oprd_megatron.errors import DataError, UserError
from oprd_megatron.library.teacher_service.frames import CONTENT_TYPE, Question, ServiceInfo, pack_answer
from oprd_megatron.library.teacher_service.scoring import Scorer
from oprd_megatron.platform import init_distributed, select_platform

IDLE_SECONDS = 1.0
"""Rank 0 speaks to the others at least so often."""
READ_SECONDS = 60.0
"""Longest silence in the middle of a request."""
MOST_WAITING = 64
"""Questions in the queue; more are refused."""
STOP = "stop"


@dataclass(frozen=True)
class Asked:
    """A question, and where its answer (a frame) is waited for."""

    question: Question
    answer: Future[bytes]


def serve(config: RunConfig, host: str, port: int, max_frame_bytes: int) -> None:
    """Keep a teacher's service until SIGTERM or Ctrl-C. Every rank calls it.

    Raises:
        UserError: the teacher or the bridge cannot be read, or the address is taken.
    """
    platform = select_platform(config.run.device)
    init_distributed(platform)
    server = (
        _listen(host, port) if dist.get_rank() == 0 else None
    )  # an address that is taken shows before the teacher is read
    scorer = Scorer(config, platform, max_frame_bytes)
    if server is not None:
        waiting: queue.Queue[Asked] = queue.Queue(MOST_WAITING)
        server.RequestHandlerClass, stop = _handler(scorer.info, waiting), threading.Event()
        _on_signals(lambda number, frame: stop.set())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        bridge = f"projected to {scorer.info.width}" if scorer.info.bridge else f"{scorer.info.width} numbers a state"
        print(f"teacher service on http://{host}:{server.server_port}: {config.teacher.path}, {bridge}", flush=True)
        _lead(scorer, waiting, stop)
        server.shutdown()
        print("stopped", flush=True)
    else:
        _on_signals(lambda number, frame: None)  # rank 0 says when it is over
        _follow(scorer)
    dist.barrier()
    dist.destroy_process_group()


def _lead(scorer: Scorer, waiting: queue.Queue[Asked], stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            asked = waiting.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            _tell(None)
            continue
        _tell(asked.question)
        asked.answer.set_result(pack_answer(scorer.score(asked.question)))
    _tell(STOP)


def _follow(scorer: Scorer) -> None:
    while (said := _tell(None)) != STOP:
        if isinstance(said, Question):
            scorer.score(said)


def _tell(value: Any) -> Any:
    """Rank 0's value on every rank; pickles among our own ranks."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _listen(host: str, port: int) -> ThreadingHTTPServer:
    """Nobody is answered yet: its `RequestHandlerClass` is still to come."""
    try:
        return _Server((host, port), BaseHTTPRequestHandler)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose an address that is free") from None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no event here."""


def _handler(info: ServiceInfo, waiting: queue.Queue[Asked]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """One connection."""

        protocol_version = "HTTP/1.1"
        timeout = READ_SECONDS

        def do_GET(self) -> None:
            if self.path != "/v1/info":
                self.refuse(HTTPStatus.NOT_FOUND, f"{self.path[:80]} is not here; there are /v1/info and /v1/states")
                return
            self.reply(HTTPStatus.OK, "application/json", info.model_dump_json().encode())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/v1/states":
                self.refuse(HTTPStatus.NOT_FOUND, f"{self.path[:80]} is not here; there are /v1/info and /v1/states")
            elif not length.isdecimal():
                self.refuse(HTTPStatus.LENGTH_REQUIRED, "a question says how long it is (Content-Length)")
            elif int(length) > info.max_frame_bytes:
                self.refuse(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"{length} bytes are more than the {info.max_frame_bytes} of a frame; ask for fewer sequences at a time",
                )
            else:
                self.answer(self.rfile.read(int(length)))

        def answer(self, frame: bytes) -> None:
            try:
                asked = Asked(Question.unpack(frame, info), Future())
                waiting.put_nowait(asked)
            except DataError as error:
                self.refuse(HTTPStatus.BAD_REQUEST, str(error))
            except queue.Full:
                self.refuse(
                    HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_WAITING} questions are waiting already; ask again later"
                )
            else:
                self.reply(HTTPStatus.OK, CONTENT_TYPE, asked.answer.result())

        def refuse(self, status: HTTPStatus, line: str) -> None:
            self.close_connection = True  # what follows on it was not read
            self.reply(status, "application/json", json.dumps({"error": line}).encode())

        def reply(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Requests are not logged."""

    return Handler
