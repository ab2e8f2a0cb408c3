"""Finished `.distcp` files held against their records: before a resume, and by `inspect --checksums`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from zlib_ng import zlib_ng as zlib

from checkpoints_conversion.convert.blocks import BLOCK_BYTES
from checkpoints_conversion.convert.jobs import Records
from checkpoints_conversion.torch_dist.container import Span, read_blob
from checkpoints_conversion.torch_dist.pickles import Malformed
from oprd_megatron.errors import CheckpointError


def check_chunks(path: Path, records: Records, advance: Callable[[int], None]) -> None:
    """Compare the chunks in a file with its records.

    Raises:
        CheckpointError: they differ; names the tensor.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for record in records:
            blob = read_blob(Span(fd, record["start"], record["length"]))
            if (blob.dtype, blob.sizes) != (record["dtype"], tuple(record["sizes"])):
                raise Malformed(f"{record['key']} is not what was written")
            crc32 = 0
            for at in range(0, blob.record_size, BLOCK_BYTES):
                block = os.pread(fd, min(BLOCK_BYTES, blob.record_size - at), blob.record_start + at)
                crc32 = zlib.crc32(block, crc32)
                advance(len(block))
            if crc32 != record["crc32"]:
                raise Malformed(f"{record['key']} was changed after it was written")
    except Malformed as error:
        raise CheckpointError(f"{path}: {error}") from error
    finally:
        os.close(fd)
