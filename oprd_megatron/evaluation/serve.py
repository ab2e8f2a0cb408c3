"""`oprd report --serve`: the run's page on this machine's loopback, which refreshes itself while the run goes on.

The browser asks for a version, a few bytes, and for the page when that has changed. A page is drawn only when it is asked for,
the metrics are other ones, and a while has passed: at most a sixth of one core goes into drawing, for the run needs them.
Nothing else is served, no folder is listed, and requests that name another host are refused: a web page elsewhere cannot read
the run by pointing its own name at this machine.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from oprd_megatron.errors import UserError
from oprd_megatron.evaluation.report import render, template
from oprd_megatron.evaluation.run_records import age_of
from oprd_megatron.logging import METRICS_FILE
from oprd_megatron.run_directory.files import CONFIG_FILE

LOOPBACK = "127.0.0.1"
PAUSE_SHARE = 5
"""Times as long as the last drawing kept a core busy, until the next."""


class LivePage:
    """The page of a run, drawn when it has to be.

    Args:
        run_dir: of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._lock = threading.Lock()
        self._version, self._html, self._not_before = "", "", 0.0

    def state(self) -> dict[str, str | float | None]:
        """{"version": of the page that would be served now, "age": seconds since the run's last record}."""
        metrics = self.run_dir / METRICS_FILE
        with self._lock:
            return {"version": self._due(), "age": age_of(metrics) if metrics.exists() else None}

    def html(self) -> str:
        """The page, or one that waits for the first record."""
        with self._lock:
            version = self._due()
            if version != self._version:
                start = time.thread_time()
                self._html = self._draw(version)
                pause = PAUSE_SHARE * (time.thread_time() - start)
                self._version, self._not_before = version, time.monotonic() + pause
            return self._html

    def _due(self) -> str:
        """Version of the metrics, or of the page as it is while it may not be drawn again."""
        if time.monotonic() < self._not_before:
            return self._version
        metrics = self.run_dir / METRICS_FILE
        if not metrics.exists():
            return "none"
        found = metrics.stat()
        return f"{found.st_size}-{found.st_mtime_ns}"

    def _draw(self, version: str) -> str:
        try:
            return render(self.run_dir, version)
        except UserError as error:
            title, reason = self.run_dir.resolve().name, f"Nothing to show yet: {error}."
            return template("waiting.html.j2").render(title=title, reason=reason, version=version)


class _Handler(BaseHTTPRequestHandler):
    """Answers for the page, its script and its state."""

    page: LivePage

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rpartition(":")[0] not in (LOOPBACK, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._answer("text/html; charset=utf-8", self.page.html())
        elif self.path == "/state.json":
            self._answer("application/json", json.dumps(self.page.state()))
        elif self.path == "/refresh.js":
            script = files("oprd_megatron.evaluation").joinpath("templates", "refresh.js").read_text()
            self._answer("text/javascript; charset=utf-8", script)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the browser may be gone
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of every request."""


def make_server(run_dir: Path, port: int) -> ThreadingHTTPServer:
    """A server of a run's page that listens, but does not answer before `serve_forever`.

    Args:
        run_dir: of a run, which need not have a record yet.
        port: on 127.0.0.1; 0 takes a free one.

    Raises:
        UserError: the directory is no run's, or the port is taken.
    """
    if not (run_dir / METRICS_FILE).exists() and not (run_dir / CONFIG_FILE).exists():
        raise UserError(
            f"{run_dir}: holds neither {METRICS_FILE} nor {CONFIG_FILE}; give the run.dir of a run that has been started"
        )
    handler = type("Handler", (_Handler,), {"page": LivePage(run_dir)})
    try:
        server = ThreadingHTTPServer((LOOPBACK, port), handler)
    except OSError as error:
        raise UserError(
            f"--port {port}: cannot be listened on ({error.strerror}); give another one, or 0 for one that is free"
        ) from None
    server.daemon_threads = True
    return server
