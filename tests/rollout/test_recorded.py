"""The file format of rollouts: what goes in comes out, little is in memory, and what is wrong is said in one line."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oprd_megatron.errors import DataError
from oprd_megatron.rollout import Rollout
from oprd_megatron.rollout.recorded import ROWS_AT_ONCE, RolloutWriter, open_recorded
from oprd_megatron.rollout.recorded_row import SCHEMA, Recorded

SUFFIXES = [".parquet", ".jsonl"]


def row(step: int, sample_index: int, length: int = 3, **changes: Any) -> Recorded:
    """A row whose values all depend on its name. Log-probabilities are sums of powers of two: fp32 holds them."""
    ids = tuple((7 * step + 3 * sample_index + index) % 250 for index in range(length))
    logprobs = tuple(-(index % 8) / 8 for index in range(length))
    text = f"ü{step}\n{sample_index}"
    made = Recorded(step, sample_index, text, text[::-1], step % 2 == 0, step + 5, (step, 9), ids, logprobs)
    return replace(made, **changes)


def write(path: Path, rows: list[Recorded]) -> Path:
    with RolloutWriter(path) as writer:
        for each in rows:
            writer.write(each)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_goes_in_comes_out(tmp_path: Path, suffix: str) -> None:
    """Over several row groups, with steps of uneven sizes, rows without log-probabilities and text of every kind; also single
    rows, and the first and last of a group."""
    rows = [row(step, sample, 1 + (step + sample) % 5) for step in range(20) for sample in range(1 + step % 7 * 3)]
    rows[3] = replace(rows[3], logprobs=None)
    assert len(rows) > 2 * ROWS_AT_ONCE
    file = open_recorded(write(tmp_path / f"out{suffix}", rows))
    assert list(file.read(range(len(rows)))) == rows
    for some in ([0], [ROWS_AT_ONCE - 1, ROWS_AT_ONCE], [5, 70, len(rows) - 1], []):
        assert list(file.read(some)) == [rows[number] for number in some]
    assert file.index.steps.tolist() == [each.step for each in rows]
    assert file.index.samples.tolist() == [each.sample_index for each in rows]
    assert file.index.most_id == max(max(each.response_ids) for each in rows)
    if suffix == ".parquet":
        assert pq.ParquetFile(file.path).num_row_groups == math.ceil(len(rows) / ROWS_AT_ONCE)


def test_row_groups_of_any_size(tmp_path: Path) -> None:
    """A file that something else wrote, in one row group or in many: any rows are found."""
    rows = [row(sample // 8, sample % 8) for sample in range(3 * ROWS_AT_ONCE)]
    table = pa.Table.from_pylist([vars(each) for each in rows], SCHEMA)
    for size in (len(rows), 7):
        pq.write_table(table, tmp_path / "other.parquet", row_group_size=size)
        file = open_recorded(tmp_path / "other.parquet")
        for some in (range(len(rows)), [6, 7, ROWS_AT_ONCE + 1, len(rows) - 1]):
            assert list(file.read(some)) == [rows[number] for number in some]


def test_a_row_is_a_rollout_and_back() -> None:
    """Every field of a rollout but its prompt's index, which is the reader's, is in a row."""
    rollout = Rollout(4, 2, (1, 2), (3, 4, 5), 7, True, (-0.5, 0.0, -2.0))
    made = Recorded.of(rollout, step=6, prompt="p", response="r")
    assert (made.step, made.prompt, made.response) == (6, "p", "r")
    assert made.rollout(9) == replace(rollout, prompt_index=9)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_neither_writing_nor_reading_keeps_the_file_in_memory(tmp_path: Path, suffix: str) -> None:
    """Four times the rows take no more than half as much again, of Python's memory and of Arrow's."""

    def peak(count: int) -> tuple[int, int]:
        path, arrows = tmp_path / f"{count}{suffix}", [pa.total_allocated_bytes()]
        tracemalloc.start()
        with RolloutWriter(path) as writer:
            for sample in range(count):
                ids = tuple(range(1000 + sample, 1400 + sample))
                writer.write(replace(row(0, sample, 400), response_ids=ids))
                arrows.append(pa.total_allocated_bytes())
        for _ in open_recorded(path).read(range(count)):
            arrows.append(pa.total_allocated_bytes())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, max(arrows) - arrows[0]

    few, many = peak(2 * ROWS_AT_ONCE), peak(8 * ROWS_AT_ONCE)
    assert many[0] < 1.5 * few[0] and many[1] <= 1.5 * few[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_there_when_it_is_whole_and_only_then(tmp_path: Path, suffix: str) -> None:
    """Neither a row that cannot be written nor an error of the caller leaves a file; a file that is there is not touched, even
    if it comes up meanwhile."""
    path = tmp_path / f"out{suffix}"
    with pytest.raises(DataError, match="row 2: the log-probability of response token 1 is nan"):
        write(path, [row(0, 0), row(0, 1, logprobs=(0.0, math.nan, -1.0))])
    with pytest.raises(KeyError), RolloutWriter(path) as writer:
        writer.write(row(0, 0))
        assert not path.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="exists already"), RolloutWriter(path) as writer:
        writer.write(row(0, 0))
        path.write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        RolloutWriter(path)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [(path.name, "mine")]


def test_other_endings_and_missing_files_are_refused(tmp_path: Path) -> None:
    """One line; nothing is made."""
    for path in (tmp_path / "out.json", tmp_path / "out"):
        with pytest.raises(DataError, match=r"to and read from \.parquet or \.jsonl"):
            RolloutWriter(path)
        with pytest.raises(DataError, match=r"to and read from \.parquet or \.jsonl"):
            open_recorded(path)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file; write one with `oprd rollout"):
        open_recorded(tmp_path / "none.jsonl")
    assert list(tmp_path.iterdir()) == []


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"response_ids": [], "logprobs": []}, "the response has no tokens"),
    "nan": ({"logprobs": [-1.0, -1.0, math.nan]}, "of response token 2 is nan"),
    "positive": ({"logprobs": [0.25, -1.0, -1.0]}, r"of response token 0 is 0\.25"),
    "minus_infinity": ({"logprobs": [-1.0, -math.inf, -1.0]}, "of response token 1 is -inf"),
    "fewer": ({"logprobs": [-1.0]}, "1 logprobs for 3 response tokens"),
    "negative_id": ({"response_ids": [1, 2, -3]}, r"'response_ids' is '\[1, 2, -3\]', expected a list of token ids"),
    "no_step": ({"step": None}, "'step'"),
    "no_text": ({"prompt": None}, "'prompt' is 'None', expected text"),
    "below_0": ({"weight_version": -1}, "'weight_version' is '-1', expected an integer from 0"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, suffix: str, name: str) -> None:
    """File and row (line) are in the message, which is one line."""
    changes, message = BAD_ROWS[name]
    rows = [{**vars(row(0, sample)), **(changes if sample == 2 else {})} for sample in range(4)]
    path = tmp_path / f"bad{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    else:
        nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
        pq.write_table(pa.Table.from_pylist(rows, nullable), path)
    with pytest.raises(DataError, match=message) as caught:
        list(open_recorded(path).read(range(4)))
    assert "\n" not in str(caught.value)
    is_column = suffix == ".parquet" and name == "no_step"  # found without reading rows
    place = "column 'step' has rows" if is_column else "bad.jsonl:3:" if suffix == ".jsonl" else "bad.parquet: row 3:"
    assert place in str(caught.value)


@pytest.mark.parametrize("changes", [{"step": 1.0}, {"step": True}, {"finished": 1}, {"logprobs": ["a", 1, 2]},
                                     {"response_ids": [1, 2, 3.0]}, {"prompt_ids": "12"}, {"response": 3}])  # fmt: skip
def test_values_of_another_type_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """In jsonl, where any value can be anything."""
    (tmp_path / "bad.jsonl").write_text(json.dumps({**vars(row(0, 0)), **changes}) + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:1: '{next(iter(changes))}' is .*, expected "):
        open_recorded(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_columns_are_named(tmp_path: Path, suffix: str) -> None:
    """Each of them, also `logprobs`, whose values may be null."""
    for name in SCHEMA.names:
        values = {key: value for key, value in vars(row(0, 0)).items() if key != name}
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".jsonl":
            path.write_text(json.dumps(values))
        else:
            pq.write_table(pa.Table.from_pylist([values]), path)
        with pytest.raises(DataError, match=f"no (column|field) '{name}'; the (columns|fields) are "):
            open_recorded(path)


def test_columns_of_another_type_are_named(tmp_path: Path) -> None:
    """In parquet by the schema alone; widths of integers, strings and lists may be others."""
    table = pa.Table.from_pylist([vars(row(0, sample)) for sample in range(2)], SCHEMA)
    for name, kind in (("step", pa.string()), ("finished", pa.int8()), ("prompt", pa.int64()), ("logprobs", pa.string()),
                       ("response_ids", pa.list_(pa.float64()))):  # fmt: skip
        at = table.column_names.index(name)
        changed = table.set_column(at, name, pa.nulls(2, kind))
        pq.write_table(changed, tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=f"column '{name}' is .*, expected"):
            open_recorded(tmp_path / "bad.parquet")
    wide = [("step", pa.int32()), ("prompt", pa.large_string()), ("response_ids", pa.large_list(pa.uint16())),
            ("logprobs", pa.list_(pa.float64()))]  # fmt: skip
    for name, kind in wide:
        table = table.set_column(table.column_names.index(name), name, table.column(name).cast(kind))
    pq.write_table(table, tmp_path / "wide.parquet")
    assert list(open_recorded(tmp_path / "wide.parquet").read([0, 1])) == [row(0, 0), row(0, 1)]
    bare = pa.Table.from_pylist([vars(row(0, 0, logprobs=None))])  # all null: the column has no type of its own
    pq.write_table(bare, tmp_path / "bare.parquet")
    assert list(open_recorded(tmp_path / "bare.parquet").read([0])) == [row(0, 0, logprobs=None)]


def test_torn_files_are_one_line(tmp_path: Path) -> None:
    """Cut anywhere; with bytes overwritten, which never makes other rows; a line of jsonl that is no object."""
    rows = [row(0, sample, 200) for sample in range(100)]
    whole = write(tmp_path / "whole.parquet", rows).read_bytes()
    random, bad = np.random.default_rng(0), tmp_path / "bad.parquet"
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"not a sound parquet file .*; record it again"):
            open_recorded(bad)
    refused = 0
    for _ in range(60):
        at = int(random.integers(4, len(whole) - 40))
        bad.write_bytes(whole[:at] + bytes(random.integers(0, 256, 32, dtype=np.uint8)) + whole[at + 32 :])
        try:
            assert list(open_recorded(bad).read(range(100))) == rows  # what was hit is not read
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50
    for text, message in (("{", "not a line of JSON"), ("[1]", "not a JSON object"), (b"\xff", "not a line of JSON")):
        (tmp_path / "bad.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(DataError, match=rf"bad\.jsonl:1: {message}"):
            open_recorded(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_response_is_there_once(tmp_path: Path, suffix: str) -> None:
    """(step, sample_index) is a row's name; equal indices in other steps are others."""
    rows = [row(step, sample) for step in range(3) for sample in range(3)]
    open_recorded(write(tmp_path / f"good{suffix}", rows))
    with pytest.raises(DataError, match="step 1 has sample_index 2 twice"):
        open_recorded(write(tmp_path / f"bad{suffix}", [*rows, row(1, 2)]))
