"""What is installed, and the machine's ceilings: how fast a large matrix product and a copy are.

The ceiling that other stages divide by is measured and not taken from a data sheet. Products of random numbers draw more power
than products of zeros and run at lower clocks, so the operands are random.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

import torch

from .findings import Finding, at_most
from .settings import Settings, has_transformer_engine, missing, project_requirements, version

GEMM_SIZE = {"cuda": 8192, "cpu": 512}
FP8_ERROR = 0.1
"""Largest relative error of one FP8 layer against bf16 that counts as working; 4 % is usual."""


def versions(settings: Settings) -> Iterator[Finding]:
    """What is installed, and what that leaves out."""
    names = ("torch", "megatron-core", "transformers", "transformer-engine", "apex", "vllm")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    yield Finding("versions", "pass", ", ".join(f"{name} {value}" for name, value in found.items() if value))
    absent = missing(project_requirements())
    figure = f"missing: {', '.join(absent)}" if absent else "all packages of pyproject.toml are there"
    yield Finding("packages", "FAIL" if absent else "pass", figure)
    if found["apex"] is None:
        adam = "Transformer Engine's" if has_transformer_engine() else "torch's"
        yield Finding("apex", "skip", f"absent, which costs little: mcore uses {adam} Adam")


def device(settings: Settings) -> Iterator[Finding]:
    """Which device, its driver and its memory."""
    if not settings.is_cuda:
        threads = torch.get_num_threads()
        yield Finding("device", "pass", f"CPU, {threads} threads; what needs a GPU is skipped or small")
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding(
        "device", "pass",
        f"{properties.name}, capability {properties.major}.{properties.minor}, driver {_driver()}, CUDA {torch.version.cuda}, "
        f"NCCL {nccl}",
    )  # fmt: skip
    yield Finding("memory", "pass", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def ceilings(settings: Settings) -> Iterator[Finding]:
    """The bf16 product and the copy."""
    size = GEMM_SIZE[settings.device]
    yield Finding("bf16 GEMM", "pass", f"{gemm_flops(settings.device) / 1e12:.3g} TFLOP/s at {size} cubed")
    count = 2**30 if settings.is_cuda else 2**23
    source = torch.ones(count, device=settings.device)
    target = torch.empty_like(source)
    seconds = measure(lambda: target.copy_(source), settings.device)
    yield Finding(
        "copy", "pass", f"{2 * 4 * count / seconds / 1e9:.3g} GB/s, read and written, {4 * count / 2**20:.0f} MiB"
    )


def transformer_engine(settings: Settings) -> Iterator[Finding]:
    """Import it and run one FP8 layer; the first thing that is tried after it was built."""
    if not has_transformer_engine():
        yield Finding("transformer-engine", "skip", "absent: no FP8 through mcore; attention and norms are our own")
        return
    if not settings.is_cuda:
        yield Finding("transformer-engine", "skip", "installed, but it needs a GPU")
        return
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    yield Finding("transformer-engine", "pass", f"transformer_engine.pytorch imports, {version('transformer-engine')}")
    if torch.cuda.get_device_capability() < (8, 9):
        yield Finding("FP8 layer", "skip", "needs compute capability 8.9 or more")
        return
    torch.manual_seed(0)
    layer = te.Linear(1024, 2048, bias=False, params_dtype=torch.bfloat16).cuda()
    tokens = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = tokens.float() @ layer.weight.float().T
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            found = layer(tokens).float()
    yield at_most("FP8 layer", float((found - expected).norm() / expected.norm()), FP8_ERROR, "relative error")


def gemm_flops(device: str) -> float:
    """FLOP/s of a square bf16 product of random numbers: 2 n^3 over the median time."""
    size = GEMM_SIZE[device]
    torch.manual_seed(0)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / measure(lambda: left @ right, device)


def measure(work: Callable[[], object], device: str, rounds: int = 10) -> float:
    """Median seconds of some work, after three warm-ups, on the clock of the host. Launching takes microseconds: work that is
    measured takes many of them."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown (no nvidia-smi)"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"


CHECKS = [versions, device, ceilings, transformer_engine]
