"""Rollouts in a file: what `oprd rollout` writes and `rollout.engine: file` reads.

`.jsonl` is for looking into; `.parquet` is smaller and is opened without parsing its text (`recorded_row` has the columns).
Writing and reading keep a few dozen rows in memory, whatever the file's size.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from oprd_megatron.errors import DataError
from oprd_megatron.rollout.recorded_row import SCHEMA, Recorded, checked_row

SUFFIXES = (".parquet", ".jsonl")

ROWS_AT_ONCE = 64
"""Rows of a parquet row group, and rows that are decoded at a time."""


def check_suffix(path: Path) -> None:
    """Refuse a file name whose ending names no format.

    Raises:
        DataError: it ends otherwise.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path}: rollouts are written to and read from {' or '.join(SUFFIXES)}, not {path.suffix!r}; rename it"
        )


class RolloutWriter:
    """Writes rows to a new file: under another name until the block ends without an error, and then renamed.

    Args:
        path: .parquet or .jsonl.

    Raises:
        DataError: another ending, the file exists, or a row is not fit to be read again.
    """

    def __init__(self, path: Path) -> None:
        check_suffix(path)
        self.path, self._staging = path, path.with_name(path.name + ".tmp")
        self._refuse_existing()
        self.count = 0
        """Rows written."""
        kind = _ParquetOut if path.suffix == ".parquet" else _JsonlOut
        self._out: _ParquetOut | _JsonlOut = kind(self._staging)

    def write(self, row: Recorded) -> None:
        """Append a row."""
        values = dict(vars(row))
        checked_row(values, f"{self.path}: row {self.count + 1}")
        self._out.write(values)
        self.count += 1

    def __enter__(self) -> RolloutWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._out.close()
            if kind is None:
                self._refuse_existing()
                self._staging.rename(self.path)
        finally:
            self._staging.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise DataError(f"{self.path}: exists already; nothing is overwritten, give another name")


class _JsonlOut:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _ParquetOut:
    def __init__(self, path: Path) -> None:
        self._writer, self._rows = pq.ParquetWriter(path, SCHEMA, write_page_checksum=True), list[dict[str, Any]]()

    def write(self, values: dict[str, Any]) -> None:
        self._rows.append(values)
        if len(self._rows) == ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, SCHEMA))
        self._rows.clear()


@dataclass(frozen=True)
class Index:
    """Which rows a file has, in its order.

    Attributes:
        steps, samples: each row's step and sample_index; [R] int64.
        most_id: a bound on the token ids of the responses; None where only reading them would tell.
    """

    steps: np.ndarray
    samples: np.ndarray
    most_id: int | None


class RecordedFile(Protocol):
    """A file of rollouts that is open for reading."""

    path: Path
    index: Index

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[Recorded]:
        """Rows by number (from 0, ascending), decoded as they are asked for.

        Raises:
            DataError: a row is malformed; the message names file and row.
        """
        ...


def open_recorded(path: Path) -> RecordedFile:
    """Open a file and read its index.

    Of parquet, only the columns of the index and the statistics of token ids are read; of jsonl, every line, one at a time.

    Raises:
        DataError: no such file, another ending, columns that are missing or of another type, a malformed line, or a step with
            the same sample_index twice.
    """
    check_suffix(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; write one with `oprd rollout CONFIG --out {path}`")
    file: RecordedFile = _ParquetFile(path) if path.suffix == ".parquet" else _JsonlFile(path)
    steps, samples = file.index.steps, file.index.samples
    order = np.lexsort((samples, steps))
    again = (np.diff(steps[order]) == 0) & (np.diff(samples[order]) == 0)
    if again.any():
        row = order[1:][again][0]
        raise DataError(
            f"{path}: step {steps[row]} has sample_index {samples[row]} twice; remove one of them, or record it again"
        )
    return file


class _JsonlFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._lines, steps, samples = (array("q") for _ in range(4))
        start, most = 0, -1
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = self._parse(line, number)
                    steps.append(row.step)
                    samples.append(row.sample_index)
                    most = max(most, *row.response_ids)
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
        self.index = Index(np.array(steps, np.int64), np.array(samples, np.int64), most)

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[Recorded]:
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(self._starts[row])
                yield self._parse(file.readline(), self._lines[row])

    def _parse(self, line: bytes, number: int) -> Recorded:
        place = f"{self.path}:{number}"
        try:
            values = json.loads(line)
        except ValueError:
            raise DataError(f"{place}: not a line of JSON; record the file again") from None
        if not isinstance(values, dict):
            raise DataError(f"{place}: not a JSON object; record the file again")
        return checked_row(values, place)


class _ParquetFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        with self._readable():
            file = pq.ParquetFile(path, page_checksum_verification=True)
            _check_schema(file.schema_arrow, path)
            names = file.read(columns=["step", "sample_index"])
        for name in names.column_names:
            if names.column(name).null_count:
                raise DataError(f"{path}: column {name!r} has rows without a value; record the file again")
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        self._firsts = np.cumsum([0, *(group.num_rows for group in groups)])
        self.index = Index(
            names.column("step").to_numpy().astype(np.int64),
            names.column("sample_index").to_numpy().astype(np.int64),
            _most_id(groups),
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[Recorded]:
        wanted = np.asarray(rows, np.int64)
        with self._readable():
            file = pq.ParquetFile(self.path, page_checksum_verification=True)
            for group in np.unique(np.searchsorted(self._firsts, wanted, side="right") - 1):
                first = int(self._firsts[group])
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[int(group)], columns=SCHEMA.names):
                    here = wanted[(wanted >= first) & (wanted < first + batch.num_rows)]
                    for row, values in zip(here, batch.take(pa.array(here - first)).to_pylist(), strict=True):
                        yield checked_row(values, f"{self.path}: row {row + 1}")
                    first += batch.num_rows

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{self.path}: not a sound parquet file ({reason}); record it again") from None


def _most_id(groups: Sequence[Any]) -> int | None:
    """The highest response id by the row groups' statistics; None if one of them has none."""
    most = -1
    for group in groups:
        columns = (group.column(number) for number in range(group.num_columns))
        column = next(column for column in columns if column.path_in_schema.startswith("response_ids."))
        if column.statistics is None or not column.statistics.has_min_max:
            return None
        most = max(most, column.statistics.max)
    return most


def _check_schema(found: pa.Schema, path: Path) -> None:
    for field in SCHEMA:
        if field.name not in found.names:
            raise DataError(f"{path}: no column {field.name!r}; the columns are {', '.join(found.names)}")
        kind = found.field(field.name).type
        if not _same_kind(kind, field.type):
            raise DataError(f"{path}: column {field.name!r} is {kind}, expected {field.type}; record the file again")


def _same_kind(kind: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of both are the same in Python: integers of any width, strings and lists of either offset width."""
    types = pa.types
    if types.is_list(expected):
        is_list = types.is_list(kind) or types.is_large_list(kind)
        return types.is_null(kind) or (is_list and _same_kind(kind.value_type, expected.value_type))
    tests = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        lambda t: types.is_string(t) or types.is_large_string(t),
    )
    return any(test(kind) and test(expected) for test in tests)
