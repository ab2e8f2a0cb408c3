"""Reading some fields of .jsonl, .json and .parquet files, row by row; every mistake names its file and line.

A place (`Place`) is what an error message calls a row: `file.jsonl:12`, `file.json: item 3`, `file.parquet: row 3`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from oprd_megatron.errors import DataError

Place = str
Row = tuple[Place, dict[str, Any]]


def read_fields(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """(place, {field: value}) of each row, read as they are asked for.

    Raises:
        DataError: the file is missing, malformed, of an unknown kind, or a row lacks one of the fields.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of prompt file {path.suffix!r}; use one of {', '.join(readers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the prompts' path")
    return readers[path.suffix](path, list(dict.fromkeys(fields)))


def _read_jsonl(path: Path, fields: list[str]) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _fields_of(_parse(line, place), fields, place)


def _read_json(path: Path, fields: list[str]) -> Iterator[Row]:
    items = _parse(path.read_bytes(), str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: holds {_a(items)}, expected a list of objects")
    for number, item in enumerate(items, start=1):
        place = f"{path}: item {number}"
        yield place, _fields_of(item, fields, place)


def _read_parquet(path: Path, fields: list[str]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({str(error).partition(chr(10))[0]})") from None
    columns = file.schema_arrow.names
    missing = next((field for field in fields if field not in columns), None)
    if missing is not None:
        raise DataError(f"{path}: no column {missing!r}; the columns are {', '.join(columns)}")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=fields):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", row


def _parse(text: bytes, place: Place) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError:
        raise DataError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{place}: not valid JSON ({error.msg}{line}, column {error.colno})") from None


def _fields_of(item: Any, fields: list[str], place: Place) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"{place}: holds {_a(item)}, expected an object such as {{{json.dumps(fields[0])}: ..}}")
    missing = next((field for field in fields if field not in item), None)
    if missing is not None:
        raise DataError(f"{place}: no field {missing!r}; the fields are {', '.join(item) or 'none'}")
    return {field: item[field] for field in fields}


def _a(value: Any) -> str:
    """A JSON value's kind, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
