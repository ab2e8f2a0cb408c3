"""The live page: what the server answers, and what a browser shows while a run goes on."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from oprd_megatron.errors import UserError
from oprd_megatron.evaluation import serve
from oprd_megatron.evaluation.serve import LivePage, make_server
from oprd_megatron.logging import JsonlLogger
from tests.evaluation.test_report import eval_record, sample, train_record, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
HOSTILE = "</div><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"


@contextmanager
def served(run_dir):
    """The port of a server of this directory, in a thread."""
    with make_server(run_dir, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port, path, host=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, body


def append(run_dir, *records):
    """What the run's own logger does."""
    logger = JsonlLogger(run_dir / "metrics.jsonl")
    for record in records:
        logger.log(record)
    logger.close()


def test_only_the_page_its_script_and_its_state_are_served(tmp_path):
    """No file of the run directory, no listing, no way out of it; and nothing for a page that calls this machine its own."""
    run_dir = write_run(tmp_path, [train_record(1)])
    with served(run_dir) as port:
        status, headers, page = get(port, "/")
        assert status == 200 and "step 1 of 30" in page and "script-src 'self'" in page
        assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
        assert get(port, "/refresh.js")[0] == get(port, "/state.json")[0] == 200
        assert get(port, "/", host=f"localhost:{port}")[0] == 200
        for path in ("/metrics.jsonl", "/config.yaml", "/../metrics.jsonl", "/?", "/templates/", "/index.html"):
            assert get(port, path)[0] == 404, path
        assert get(port, "/", host=f"evil.example:{port}")[0] == 403


def test_a_page_is_drawn_when_the_metrics_changed_and_not_at_every_look(tmp_path, monkeypatch):
    """Of ten looks one draws; after a new record the next does, but not before a pause in proportion to the drawing."""
    run_dir = write_run(tmp_path, [train_record(1)])
    drawn = []
    monkeypatch.setattr(serve, "render", lambda run_dir, version: drawn.append(1) or f"page {len(drawn)}")
    monkeypatch.setattr(serve, "PAUSE_SHARE", 0)
    page = LivePage(run_dir)
    for _ in range(10):
        version = page.state()["version"]
        assert page.html() == "page 1"
    append(run_dir, train_record(2))
    assert page.state()["version"] != version and page.html() == "page 2" and len(drawn) == 2
    page._not_before = time.monotonic() + 60
    version = page.state()["version"]
    append(run_dir, train_record(3))
    assert page.state()["version"] == version and page.html() == "page 2"


def test_a_run_without_a_record_waits_and_another_directory_is_refused(tmp_path, monkeypatch):
    """With a config the page says that it waits, and becomes the run's page; without one there is one line."""
    with pytest.raises(UserError, match=r"holds neither metrics\.jsonl nor config\.yaml; give the run\.dir") as error:
        make_server(tmp_path, 0)
    assert "\n" not in str(error.value)
    (tmp_path / "config.yaml").write_text("run: {steps: 9}\n")
    monkeypatch.setattr(serve, "PAUSE_SHARE", 0)
    with served(tmp_path) as port:
        assert "Nothing to show yet" in get(port, "/")[2]
        assert json.loads(get(port, "/state.json")[2])["age"] is None
        append(tmp_path, {"kind": "train", "step": 1, "loss": 1.0})
        state = json.loads(get(port, "/state.json")[2])
        assert state["version"] != "none" and 0 <= state["age"] < 60
        assert "step 1 of 9" in get(port, "/")[2]


def test_the_command_says_where_ends_with_ctrl_c_and_refuses_a_taken_port(tmp_path):
    """Its address on the first line, exit code 0 and no traceback on an interrupt; a taken port is one line and code 2."""
    run_dir = write_run(tmp_path, [{"kind": "train", "step": 1, "loss": 1.0}])
    command = [sys.executable, "-m", "oprd_megatron.cli", "report", str(run_dir), "--serve", "--port"]
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", line)[1]
        assert get(int(port), "/state.json")[0] == 200
        taken = subprocess.run([*command, port], capture_output=True, text=True, check=False)
        assert taken.returncode == 2 and taken.stderr.startswith(f"error: --port {port}: cannot be listened on")
        assert taken.stderr.count("\n") == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stderr.read() == ""
    assert not (run_dir / "report.html").exists()


@pytest.fixture(scope="module")
def live_run(tmp_path_factory):
    """A run at step 3 of 30, with a sample that tries to run as HTML."""
    records = [eval_record(0, samples=[{**sample(HOSTILE), "prompt": HOSTILE}]), *map(train_record, (1, 2, 3))]
    return write_run(tmp_path_factory.mktemp("live"), records)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install -y chromium")


@needs_chromium
def test_a_browser_shows_the_figures(live_run, tmp_path, width=500):
    """The screenshot has the lines' colours at nearly a phone's width (Chromium's least), and nothing is wider than that."""
    picture = tmp_path / "page.png"
    with served(live_run) as port:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},4000"]
        command += [f"--screenshot={picture}", f"http://127.0.0.1:{port}/"]
        subprocess.run(command, capture_output=True, check=True, timeout=60)
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert pixels.shape[1] == width
    for color in ((0x3B, 0x82, 0xF6), (0xF0, 0x8C, 0x1A), (0x16, 0xA3, 0x7B)):  # lines and phases
        assert (np.abs(pixels - color).sum(axis=2) < 12).sum() > 300
    assert len(np.unique(pixels[:, -8:].reshape(-1, 3), axis=0)) == 1  # the margin on the right is bare


@needs_chromium
def test_a_browser_shows_new_steps_by_itself(live_run, tmp_path, monkeypatch):
    """The run goes on after the second look of an open page, which shows the new step without being loaded again; text from
    models stays text."""
    looks = []

    class GoingOn(LivePage):
        def state(self):
            looks.append(1)
            if len(looks) == 3:
                append(live_run, train_record(4), train_record(5))
            return super().state()

    monkeypatch.setattr(serve, "LivePage", GoingOn)
    monkeypatch.setattr(serve, "PAUSE_SHARE", 0)
    with served(live_run) as port:
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=12000", "--dump-dom"]
        command += [f"http://127.0.0.1:{port}/"]
        page = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout
    assert len(looks) >= 3 and "step 5 of 30" in page and "step 3 of 30" not in page
    assert page.count('role="img"') > 20 and "last record" in page
    assert "<title>taken" not in page and page.count("&lt;script&gt;") == 2 and page.count("<script") == 1
