"""Opening and reading files that strangers made: never waits for a pipe, never reads a device; each failure is one line."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from checkpoints_conversion.files.messages import reason
from oprd_megatron.errors import CheckpointError


def open_regular(path: Path) -> int:
    """A file descriptor for reading.

    Raises:
        CheckpointError: no such file, unreadable, or no regular file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise CheckpointError(f"{path}: cannot be read ({why}); check the file") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
    return fd


def read_at(fd: int, position: int, out: memoryview, path: Path) -> None:
    """Fill `out` (bytes) from `position` on.

    Raises:
        CheckpointError: the file ends before, or the disk failed.
    """
    done = 0
    while done < len(out):
        try:
            count = os.preadv(fd, [out[done:]], position + done)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
        if count == 0:
            raise CheckpointError(f"{path}: became shorter while it was read; is someone writing it?")
        done += count


def read_whole(path: Path, max_bytes: int) -> bytes:
    """All bytes of a small file.

    Raises:
        CheckpointError: what `open_regular` and `read_at` refuse, or more than `max_bytes`.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size} bytes are too many for such a file; download it again")
        data = bytearray(size)
        read_at(fd, 0, memoryview(data), path)
        return bytes(data)
    finally:
        os.close(fd)
