#!/usr/bin/env python3
"""Keep one GPU architecture in the .nv_fatbin section of a shared library and zero the rest, so that it compresses.

Usage: shrink_fatbin.py IN.so OUT.so 90

A CUDA library carries machine code for many architectures. Offsets stay as they are; only the entries of other
architectures inside each fatbin container are dropped and the freed bytes zeroed. The container layout is not documented by
NVIDIA: after shrinking, import the library on the GPU and run one kernel before trusting it.
Measured: transformer_engine_cu13 2.20.2, 263.7 MiB wheel to 30.9 MiB with sm_90 alone (not yet loaded on a GPU).
"""

import collections
import struct
import subprocess
import sys
from pathlib import Path

CONTAINER_MAGIC = 0xBA55ED50


def fatbin_section(path: str) -> tuple[int, int]:
    """File offset and size of .nv_fatbin, in bytes."""
    table = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
    for line in table.splitlines():
        fields = line.replace("[ ", "[").split()
        if ".nv_fatbin" in fields:
            i = fields.index(".nv_fatbin")
            return int(fields[i + 3], 16), int(fields[i + 4], 16)
    raise SystemExit(f"{path}: no .nv_fatbin section")


def main(source: str, target: str, sm: int) -> None:
    data = bytearray(Path(source).read_bytes())
    start, size = fatbin_section(source)
    position, end = start, start + size
    containers, kept, sizes = 0, 0, collections.Counter[int]()
    while position < end - 16:
        magic, _version, header, body = struct.unpack_from("<IHHQ", data, position)
        if magic != CONTAINER_MAGIC:
            position += 8
            continue
        containers += 1
        entry, stop, keep = position + header, position + header + body, []
        while entry < stop:
            _kind, _v, entry_header = struct.unpack_from("<HHI", data, entry)
            (payload,) = struct.unpack_from("<Q", data, entry + 8)
            (entry_sm,) = struct.unpack_from("<I", data, entry + 28)
            total = entry_header + payload
            sizes[entry_sm] += total
            if entry_sm == sm:
                keep.append(bytes(data[entry : entry + total]))
            entry += total
        if entry != stop:
            raise SystemExit(f"{source}: container at {position:#x} does not parse; layout unknown")
        code = b"".join(keep)
        data[position + header : stop] = code + bytes(body - len(code))
        struct.pack_into("<Q", data, position + 8, len(code))
        kept += len(code)
        position = stop
    Path(target).write_bytes(data)
    print(f"{containers} containers, {kept} bytes of sm_{sm} kept; by architecture: {dict(sorted(sizes.items()))}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
