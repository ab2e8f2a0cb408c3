"""Reading one field of .jsonl, .json and .parquet files, row by row; every mistake names its file and line.

A place (`Place`) is what an error message calls a row: `file.jsonl:12`, `file.json: item 3`, `file.parquet: row 3`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oprd_megatron.errors import DataError

Place = str
Row = tuple[Place, Any]


def read_field(path: Path, field: str) -> Iterator[Row]:
    """(place, value of `field`) of each row, read as they are asked for.

    Raises:
        DataError: the file is missing, malformed, of an unknown kind, or a row has no such field.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of prompt file {path.suffix!r}; use one of {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the prompts' path")
    return readers[path.suffix](path, field)


def _read_jsonl(path: Path, field: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _field_of(_parse(line, place), field, place)


def _read_json(path: Path, field: str) -> Iterator[Row]:
    items = _parse(path.read_bytes(), str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: holds {_a(items)}, expected a list of objects")
    for number, item in enumerate(items, start=1):
        place = f"{path}: item {number}"
        yield place, _field_of(item, field, place)


def _read_parquet(path: Path, field: str) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({str(error).partition(chr(10))[0]})") from None
    columns = file.schema_arrow.names
    if field not in columns:
        raise DataError(f"{path}: no column {field!r}; the columns are {', '.join(columns)}")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield f"{path}: row {number}", value


def _parse(text: bytes, place: Place) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}: not valid JSON ({error.msg}{line}, column {error.colno})") from None


def _field_of(item: Any, field: str, place: Place) -> Any:
    if not isinstance(item, dict):
        raise DataError(f"{place}: holds {_a(item)}, expected an object such as {{{json.dumps(field)}: ..}}")
    if field not in item:
        raise DataError(f"{place}: no field {field!r}; the fields are {', '.join(item) or 'none'}")
    return item[field]


def _a(value: Any) -> str:
    """A JSON value's kind, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
