"""Damages the files of a tiny model, one at a time, and reads it; run by test_fuzz.py in a process of its own.

    python fuzzing.py MODELS SEED      MODELS/<target> holds the good model of each target

Prints one line of JSON: how many cases each target had, how many were refused, what was wrong, and how much memory grew.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion import check_model, read_architecture
from checkpoints_conversion.files.source import TensorSource
from checkpoints_conversion.formats import copy_companions, model_architecture, open_source
from checkpoints_conversion.reader import HFReader, check_tensors, read_rows
from checkpoints_conversion.tokenizer import check_tokenizer, companion_files
from oprd_megatron.errors import CheckpointError

SECONDS_A_CASE = 5
MAX_MESSAGE = 400
MAX_EXTRA_ADDRESSES = 2 * 2**30
"""Address space that the cases may take beyond what is taken before them."""
RAW = "@raw@"
RAW_JSON = (
    "NaN",
    "-Infinity",
    "1e999",
    "1" * 5000,
    "9" * 400,
    "-9223372036854775809",
    "[" * 50_000 + "]" * 50_000,
    '{"a":' * 900 + "1" + "}" * 900,
    '{"a": 1, "a": 2}',
    '"\\ud800"',
    '"' + "x" * 100_000 + '"',
    "[" + "0," * 100_000 + "0]",
)
"""JSON that `json.dumps` does not write."""
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        10**30,
        0.5,
        -1.5,
        1e300,
        "",
        "x",
        "0",
        "a\nb",
        "\x00",
        "\u202e",
        "é" * 300,
    ),
    *(
        "../x",
        "/dev/zero",
        "/etc/passwd",
        "F32",
        "I8",
        [],
        {},
        [[]],
        [1, 2],
        [-1],
        [2**62] * 8,
        {"a": 1},
        ["x"],
        [None] * 50,
    ),
)


@dataclass(frozen=True)
class Target:
    """Files that are damaged in turn, and what reads them."""

    name: str
    cases: int
    pattern: str
    read: Callable[[Path], None]
    as_json: float = 0.0
    """Share of the cases in which the file is damaged as JSON, not as bytes."""


def read_some(source: TensorSource, dice: random.Random) -> None:
    """A few rows and columns of a few tensors."""
    for name in dice.sample(sorted(source.names), min(4, len(source.names))):
        shape = source.shape(name)
        if len(shape) not in (1, 2) or not all(shape):
            continue
        rows = min(shape[0], 3)
        read_rows(source, name, shape[0] - rows, rows)
        if len(shape) == 2:
            read_rows(source, name, 0, rows, (shape[1] // 2, shape[1]))


def read_model(directory: Path) -> None:
    check_model(directory)
    with HFReader(directory) as reader:
        read_some(reader, random.Random(0))


def read_any(directory: Path) -> None:
    source = open_source(directory)
    try:
        check_tensors(source, model_architecture(directory), directory)
        read_some(source, random.Random(0))
    finally:
        source.close()


def read_gguf(directory: Path) -> None:
    read_any(directory)
    out = directory / "out"
    out.mkdir(exist_ok=True)
    copy_companions(directory, out)


def read_tokenizer(directory: Path) -> None:
    companion_files(directory)
    check_tokenizer(directory, read_architecture(directory))


TARGETS = (
    Target("safetensors", 160, "model.safetensors", read_model, as_json=0.6),
    Target("shards", 60, "model-*.safetensors", read_model, as_json=0.5),
    Target("index", 100, "model.safetensors.index.json", read_model, as_json=0.8),
    Target("config", 200, "config.json", read_model, as_json=0.9),
    Target("bin", 150, "pytorch_model.bin", read_any),
    Target("legacy", 60, "pytorch_model.bin", read_any),
    Target("gguf", 200, "model.gguf", read_gguf),
    Target("tokenizer", 80, "*.json", read_tokenizer, as_json=0.8),
    Target("pieces", 40, "tokenizer.model", read_tokenizer),
)


def damaged_bytes(content: bytes, dice: random.Random) -> bytes:
    """One to three mutations; most strike the first and last bytes, where headers and directories are."""
    data = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        size = len(data)
        if not size:
            break
        place = dice.choice(
            (
                dice.randrange(size),
                dice.randrange(min(size, 16)),
                dice.randrange(min(size, 4096)),
                size - 1 - dice.randrange(min(size, 2048)),
            )
        )
        length = dice.choice((1, 2, 4, 8, 100))
        kind = dice.randrange(8)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            data += dice.randbytes(length)
        elif kind in (2, 3, 4):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 5:
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == 6:
            start = dice.randrange(size)
            data[place : place + length] = data[start : start + length]
        else:
            number = dice.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, size, size - 8, size * 2, 100_000_000))
            data[place : place + 8] = (number % 2**64).to_bytes(8, "little")
    return bytes(data)


def damaged_json(text: bytes, dice: random.Random) -> bytes:
    """One to three values replaced, keys renamed, removed, doubled or added, anywhere in the tree."""
    root = [json.loads(text)]
    raw: list[str] = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        holder: Any = root
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(holder[key], dict | list) and dice.random() < 0.8:
                holder = holder[key]
                continue
            _strike(holder, key, raw, dice)
            break
    written = json.dumps(root[0] if root else None)
    for replacement in raw:
        written = written.replace(f'"{RAW}"', replacement, 1)
    if dice.random() < 0.1:
        written = written.replace("{", '{"twice": 1, "twice": 2, ', 1)
    return written.encode("utf-8", "surrogatepass")


def _strike(holder: Any, key: Any, raw: list[str], dice: random.Random) -> None:
    kind = dice.randrange(8)
    if kind == 0:
        raw.append(dice.choice(RAW_JSON))
        holder[key] = RAW
    elif kind == 1 and isinstance(holder, dict):
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[dice.choice(("new", "a\nb", "x" * 5000, "", "\x1b[31m", "__metadata__", f"{key}x"))] = holder.pop(key)
    elif kind == 3 and isinstance(holder, dict):
        holder[f"{key}.bias"] = copy.deepcopy(holder[key])
    elif kind == 4 and isinstance(holder[key], int):
        holder[key] += dice.choice((-1, 1, 8, 2**32))
    else:
        holder[key] = copy.deepcopy(dice.choice(VALUES))


def damaged(path: Path, target: Target, dice: random.Random) -> bytes:
    content = path.read_bytes()
    if dice.random() >= target.as_json:
        return damaged_bytes(content, dice)
    if path.suffix == ".json":
        return damaged_json(content, dice)
    length = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + length], dice)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


class TooSlow(BaseException):
    """A case took longer than it may."""


def outcome(target: Target, directory: Path) -> str | None:
    """Why a case is wrong; None if the model was read or refused as it should be. Raises CheckpointError if refused."""
    try:
        target.read(directory)
    except CheckpointError as refusal:
        message = str(refusal)
        if not message.isprintable() or len(message) > MAX_MESSAGE:
            return f"message: {message[:200]!r} ({len(message)} characters)"
        raise
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return None


def run(models: Path, seed: int) -> dict[str, Any]:
    """All cases; the file at fault and the number of the case are told with what was wrong."""
    report: dict[str, Any] = {"cases": {}, "refused": {}, "wrong": []}
    for target in TARGETS:
        target.read(models / target.name)
    before = _reset_peak()
    addresses = _memory("VmSize") + MAX_EXTRA_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    for target in TARGETS:
        directory, refusals = models / target.name, 0
        files = sorted(directory.glob(target.pattern))
        for case in range(target.cases):
            dice = random.Random(f"{seed} {target.name} {case}")
            path = dice.choice(files)
            good = path.read_bytes()
            print(f"{target.name} {case} {path.name}", file=sys.stderr, flush=True)
            path.write_bytes(damaged(path, target, dice))
            signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CASE)
            try:
                wrong = outcome(target, directory)
                if wrong is not None:
                    report["wrong"].append(f"{target.name} {case} ({path.name}): {wrong}")
            except CheckpointError:
                refusals += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                path.write_bytes(good)
                shutil.rmtree(directory / "out", ignore_errors=True)
        report["cases"][target.name], report["refused"][target.name] = target.cases, refusals
    report["grown"] = _memory("VmHWM") - before
    return report


def _memory(field: str) -> int:
    """Bytes. (`ru_maxrss` would begin with the memory of the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


def _reset_peak() -> int:
    """Forget the peak so far; the memory that is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow(f"more than {SECONDS_A_CASE} seconds")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _too_slow)
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
