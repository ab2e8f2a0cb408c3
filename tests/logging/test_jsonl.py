"""metrics.jsonl: what is written is strict JSON, and survives crashes and resumes."""

import json

import pytest

from oprd_megatron.errors import UserError
from oprd_megatron.logging import JsonlLogger, Logger, Loggers, read_records


def _train(step, **values):
    return {"kind": "train", "step": step, **values}


def test_every_record_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    """Reading beside the open logger sees all records, in order, and a second logger appends to them."""
    path = tmp_path / "run" / "metrics.jsonl"
    first = JsonlLogger(path)
    first.log(_train(1, loss=0.5, layers={"student": [1, 2], "cosine": [0.1, 0.2]}))
    assert read_records(path) == [_train(1, loss=0.5, layers={"student": [1, 2], "cosine": [0.1, 0.2]})]
    first.close()
    second = JsonlLogger(path)
    second.log(_train(2, text="naïve\nline\u2028end"))
    second.close()
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert read_records(path)[1]["text"] == "naïve\nline\u2028end"


def test_numbers_without_a_json_word_become_null(tmp_path):
    """NaN and infinities, at any depth, leave a line that a strict JSON parser accepts."""
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log(_train(1, loss=float("nan"), seconds={"rollout": float("inf")}, layers={"cosine": [1.0, float("-inf")]}))
    logger.close()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == _train(1, loss=None, seconds={"rollout": None}, layers={"cosine": [1.0, None]})


@pytest.mark.parametrize("torn", ['{"kind":"train","st', '{"kind":"train","step":3,"text":"caf\u00e9'])
def test_a_torn_last_line_is_dropped_by_readers_and_by_the_next_logger(tmp_path, torn):
    """A crash in mid-write, also inside a multi-byte character, loses that record and no other."""
    path = tmp_path / "metrics.jsonl"
    whole = '{"kind":"train","step":1}\n{"kind":"train","step":2}\n'
    path.write_bytes((whole + torn).encode()[: -1 if torn.endswith("é") else None])
    assert [record["step"] for record in read_records(path)] == [1, 2]
    logger = JsonlLogger(path)
    logger.log(_train(3))
    logger.close()
    assert path.read_text() == whole + '{"kind":"train","step":3}\n'


def test_a_bad_line_that_is_not_the_last_is_an_error_naming_it(tmp_path):
    """Only a crash's own trace is forgiven: other damage is reported with file and line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind":"train","step":1}\nnonsense\n{"kind":"train","step":2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a metrics record"):
        read_records(path)


def test_a_resumed_run_leaves_each_step_once(tmp_path):
    """After truncate_after(2) and steps 3.. again, the file equals that of a run that was never interrupted."""
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    records = [{"kind": "eval", "step": 0, "kl": 0.1}, *(_train(step, loss=1 / step) for step in range(1, 6))]
    logger = JsonlLogger(straight)
    for record in records:
        logger.log(record)
    logger.close()

    logger = JsonlLogger(resumed)
    for record in records[:5]:
        logger.log(record)
    logger.close()
    logger = JsonlLogger(resumed)
    logger.truncate_after(2)
    for record in records[3:]:
        logger.log(record)
    logger.close()
    assert resumed.read_text() == straight.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.jsonl", "straight.jsonl"]


def test_the_composite_passes_every_call_on():
    """Loggers does to each of its members what is done to it."""

    class Recorder:
        def __init__(self):
            self.calls = []

        def log(self, record):
            self.calls.append(("log", record["step"]))

        def truncate_after(self, step):
            self.calls.append(("truncate_after", step))

        def close(self):
            self.calls.append(("close",))

    members = [Recorder(), Recorder()]
    loggers: Logger = Loggers(members)
    loggers.truncate_after(3)
    loggers.log(_train(4))
    loggers.close()
    assert [member.calls for member in members] == [[("truncate_after", 3), ("log", 4), ("close",)]] * 2
