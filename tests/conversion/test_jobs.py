"""Conversions that are killed, continued, disturbed: nothing torn is ever taken for whole, nothing finished is done again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from slow_conversion import SHAPES, convert, expected, job

from checkpoints_conversion.convert.jobs import JOURNAL, MANIFEST, run_job, staging_of
from checkpoints_conversion.convert.progress import Progress
from oprd_megatron.errors import CheckpointError

SCRIPT = Path(__file__).with_name("slow_conversion.py")


def start(out: Path, workers: int, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out), str(workers), str(seconds)], stderr=subprocess.DEVNULL
    )


def assert_whole(out: Path) -> None:
    """All tensors, bit for bit, in the files that the index names, and nothing else."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == SHAPES.keys()
    files = {name: load_file(out / name) for name in set(index.values())}
    for name, file in index.items():
        assert files[file][name].tobytes() == expected(name).tobytes(), name
    assert {path.name for path in out.iterdir()} == {*files, "model.safetensors.index.json", MANIFEST}


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_and_continued(workers: int, tmp_path: Path) -> None:
    """Killed with SIGKILL again and again, a conversion is never visible as complete, keeps every finished file (same
    inode), and in the end is what an undisturbed one gives."""
    out, rng = tmp_path / "out", random.Random(workers)
    staging = staging_of(out)
    finished: dict[str, int] = {}
    for _ in range(4):
        process = start(out, workers, 0.06)
        while process.poll() is None and not len(list(staging.glob("*.safetensors"))) > len(finished):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # it was whole before the kill came
            break
        journal = (staging / JOURNAL).read_text().split("\n")[1:-1]
        now = {name: (staging / name).stat().st_ino for name in (json.loads(line)["file"] for line in journal)}
        assert finished.items() <= now.items()
        finished = now
    assert finished, "it was never far enough to have finished a file; the test proves nothing"
    if not out.exists():
        convert(out, workers, 0.0)
    assert_whole(out)
    kept = {path.name: path.stat().st_ino for path in out.glob("*.safetensors")}
    assert finished.items() <= kept.items()


def test_a_killed_conversion_leaves_no_process(tmp_path: Path) -> None:
    """Workers end with their parent, also when it is killed."""
    process = start(tmp_path / "out", 2, 5.0)
    deadline = time.monotonic() + 20
    children: list[str] = []
    while len(children) < 2 and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.1)
    assert len(children) == 2
    time.sleep(1.0)
    process.kill()
    process.wait()
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]


def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A conversion with all files finished but not published."""
    out = tmp_path / "out"
    run_job(job(0.0), staging_of(out), 1, Progress())
    return out, staging_of(out)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "header"])
def test_a_finished_file_that_changed_is_written_again(harm: str, tmp_path: Path) -> None:
    """A bit, the end, the header or the whole of a finished file is lost: only that file is made again, the result is right."""
    out, staging = begun(tmp_path)
    victim, *others = sorted(staging.glob("*.safetensors"))
    inodes = {path.name: path.stat().st_ino for path in others}
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[-5] ^= 4
    elif harm == "header":
        data[data.index(b"F32")] = ord("I")
    victim.unlink()
    if harm != "delete":
        victim.write_bytes(data[:-1] if harm == "truncate" else data)
    convert(out, 1, 0.0)
    assert_whole(out)
    assert {path.name: path.stat().st_ino for path in out.glob("*.safetensors") if path.name != victim.name} == inodes


def test_a_torn_journal_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    """A line that was cut off counts as never written."""
    out, staging = begun(tmp_path)
    journal = staging / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    convert(out, 1, 0.0)
    assert_whole(out)


def test_another_conversion_is_not_continued(tmp_path: Path) -> None:
    """What was begun with other settings is refused in one line that names them; nothing is touched."""
    _, staging = begun(tmp_path)
    before = sorted(path.stat().st_mtime_ns for path in staging.iterdir())
    with pytest.raises(CheckpointError, match="begun with another dtype"):
        run_job(job(0.0, dtype="BF16"), staging, 1, Progress())
    assert before == sorted(path.stat().st_mtime_ns for path in staging.iterdir())


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    """The second conversion to the same output says that another process is writing it."""
    out = tmp_path / "out"
    first = start(out, 1, 0.2)
    try:
        while not (staging_of(out) / JOURNAL).exists() or not (staging_of(out) / JOURNAL).stat().st_size:
            time.sleep(0.05)
        with pytest.raises(CheckpointError, match="another process is writing it"):
            convert(out, 1, 0.0)
    finally:
        first.kill()
        first.wait()


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the error says so, and with room the conversion goes on."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); sys.path.insert(0, sys.argv[1]); "
        "from slow_conversion import *; from oprd_megatron.entry import one_line_errors\n"
        "with one_line_errors(): convert(Path(sys.argv[2]), 1, 0.0)"
    )
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), str(out)], capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert "--resume" in line and not out.exists()
    convert(out, 1, 0.0)
    assert_whole(out)
