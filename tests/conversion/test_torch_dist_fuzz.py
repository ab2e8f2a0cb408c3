"""Hundreds of broken torch_dist checkpoints: each is read or refused in one line, in bounded time and memory."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from torch_dist_files import checkpoint, use

from oprd_megatron.errors import CheckpointError

MUTATIONS = 150
"""Per file; 600 in all."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Cut off, with flipped bits, with a piece moved, longer, or with a piece overwritten by edge values."""
    data = bytearray(content)
    kind = rng.randrange(6)
    at = rng.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        piece = data[at : at + rng.randrange(1, 200)]
        data[rng.randrange(len(data)) :][:0] = piece
        target = rng.randrange(len(data))
        data[target : target + len(piece)] = piece
    elif kind == 3:
        data += rng.randbytes(rng.randrange(1, 300))
    elif kind == 4:
        length = rng.choice([1, 2, 4, 8])
        data[at : at + length] = rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * length
    else:
        del data[at : at + rng.randrange(1, 50)]
    return bytes(data)


def fuzz(directory: str, seed: int) -> None:
    """Use hundreds of broken copies of a checkpoint; anything but success or a CheckpointError of one line is a failure."""
    rng = random.Random(seed)
    slowest, outcomes = 0.0, {"read": 0, "refused": 0}
    for name in (".metadata", "__0_0.distcp", "common.pt", "metadata.json"):
        path = Path(directory, name)
        content = path.read_bytes()
        for number in range(MUTATIONS):
            broken = mutated(content, rng)
            path.write_bytes(broken)
            start = time.process_time()
            try:
                use(Path(directory))
                outcomes["read"] += 1
            except CheckpointError as error:
                outcomes["refused"] += 1
                assert "\n" not in str(error) and len(str(error)) < 1000, (name, number, str(error))
            slowest = max(slowest, time.process_time() - start)
        path.write_bytes(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**outcomes, "slowest": slowest, "peak": peak}))


def test_hundreds_of_broken_checkpoints(tmp_path: Path) -> None:
    """Mutated files are read or refused in one line each, within seconds and 400 MB, in a process that may have no more."""
    directory = checkpoint(tmp_path / "ckpt")
    program = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}
from test_torch_dist_fuzz import fuzz
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fuzz({str(directory)!r}, 1)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout)
    assert outcome["slowest"] < 2 and outcome["refused"] > MUTATIONS and outcome["read"] > 10, outcome
