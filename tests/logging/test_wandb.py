"""Weights & Biases in offline mode, read back from what it would upload, with its own messages."""

import json
import struct
import time

import pytest

from oprd_megatron.config.logging import WandbConfig
from oprd_megatron.errors import UserError

wandb = pytest.importorskip("wandb", reason="needs W&B: pip install 'oprd-megatron[wandb]'")
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402

from oprd_megatron.logging.wandb import WandbLogger  # noqa: E402

SETTINGS = WandbConfig(project="distil", name="first", tags=["tiny"], mode="offline")
HEADER_BYTES, BLOCK_BYTES = 7, 32768
KEY = "0123456789abcdef" * 2 + "01234567"


def records_of(path):
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB; pieces with checksum, length, kind) behind seven bytes."""
    data, place, whole = path.read_bytes(), HEADER_BYTES, b""
    while place + HEADER_BYTES <= len(data):
        if BLOCK_BYTES - place % BLOCK_BYTES < HEADER_BYTES:
            place += BLOCK_BYTES - place % BLOCK_BYTES
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + HEADER_BYTES + length > len(data):  # is being written
            return
        whole += data[place + HEADER_BYTES : place + HEADER_BYTES + length]
        place += HEADER_BYTES + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def told(run_dir, num_runs=1):
    """The records of each offline run in a directory, in order. W&B's process writes on for a moment after a run is closed."""
    deadline = time.monotonic() + 30
    while True:
        runs = [list(records_of(path)) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]
        if len(runs) == num_runs and all(run and run[-1].HasField("exit") for run in runs):
            return runs
        assert time.monotonic() < deadline, f"{len(runs)} runs, not all of them whole"
        time.sleep(0.1)


def read(run_dir, num_runs):
    """(run ids, {tag: [(step, value)]}) of all offline runs in a directory, in order."""
    ids, found = [], {}
    for record in [record for run in told(run_dir, num_runs) for record in run]:
        if record.HasField("run"):
            ids.append(record.run.run_id)
        for item in record.history.item:
            tag = item.key or "/".join(item.nested_key)
            found.setdefault(tag, []).append((record.history.step.num, float(item.value_json)))
    return ids, {tag: values for tag, values in found.items() if not tag.startswith("_")}


def train(step):
    return {
        "kind": "train",
        "step": step,
        "loss": 1 / step,
        "layers": {"student": [1, 3], "cosine": [0.25, 0.5 * step]},
    }


def test_a_resumed_run_goes_on_in_its_run_and_repeats_no_step(tmp_path):
    """Steps 1-4, a crash, on from the checkpoint at 2: one id, each step once, with the value that W&B was told first."""
    first = WandbLogger(SETTINGS, tmp_path, {"run": {"steps": 5}}, resume=False)
    first.truncate_after(-1)
    for step in (1, 2, 3, 4):
        first.log(train(step))
        first.log({"kind": "eval", "step": step, "kl": 0.5})
    first.close()
    time.sleep(1.1)  # W&B names its folders by the second
    second = WandbLogger(SETTINGS, tmp_path, {"run": {"steps": 5}}, resume=True)
    second.truncate_after(2)
    for step in (3, 4, 5):
        second.log({**train(step), "loss": 9.0})
    second.log({"kind": "summary", "step": 5, "wall_seconds": 3.0, "export": "student_hf"})
    second.close()
    ids, found = read(tmp_path, num_runs=2)
    assert len(ids) >= 2 and len(set(ids)) == 1
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25), (5, 9.0)]
    assert found["train/cosine/layer_03"] == [(step, 0.5 * step) for step in range(1, 6)]
    assert found["eval/kl"] == [(step, 0.5) for step in range(1, 5)]
    assert found["summary/wall_seconds"] == [(5, 3.0)]


def test_a_run_that_starts_anew_is_another_run(tmp_path):
    """Without a resume the directory's old run is left as it is, and step 1 is told again."""
    for _ in range(2):
        logger = WandbLogger(SETTINGS, tmp_path, {}, resume=False)
        logger.log(train(1))
        logger.close()
    ids, found = read(tmp_path, num_runs=2)
    assert len(set(ids)) == 2 and found["train/loss"] == [(1, 1.0)] * 2


def test_config_and_summary_are_told(tmp_path):
    """W&B's config holds the run's, its summary the exported student."""
    logger = WandbLogger(SETTINGS, tmp_path, {"optimizer": {"lr": 1e-4}}, resume=False)
    logger.log({"kind": "summary", "step": 5, "wall_seconds": 3.0, "export": "student_hf"})
    logger.close()
    (records,) = told(tmp_path)
    configs = {item.key: json.loads(item.value_json) for record in records for item in record.config.update}
    assert configs["optimizer"] == {"lr": 1e-4}
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.project, run.display_name, list(run.tags)) == ("distil", "first", ["tiny"])
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert summary["export"] == '"student_hf"'


def test_an_api_key_is_written_nowhere(tmp_path, monkeypatch):
    """No file of the run directory holds the key of the environment."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = WandbLogger(SETTINGS, tmp_path, {}, resume=False)
    logger.log(train(1))
    logger.close()
    told(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_without_a_key_there_is_one_line(tmp_path, monkeypatch):
    """Online, with no key anywhere: no question, no traceback, what to do."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"logging\.wandb: No API key.*wandb login.*mode: offline") as error:
        WandbLogger(SETTINGS.model_copy(update={"mode": "online"}), tmp_path, {}, resume=False)
    assert "\n" not in str(error.value)
