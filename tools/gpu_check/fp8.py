"""What FP8 saves and loses at the shapes of a 7B model: memory, speed, error.

First the GEMMs of one layer: by torch alone (`torch._scaled_mm`, weights kept in e4m3 with one scale a tensor) and by
Transformer Engine's `te.Linear` where it is installed. The bars are the teacher's; for it they are necessary, not sufficient:
attention, norms and the embedding stay in bf16. Then the teacher itself (`fp8_teacher`), its weights alone in fp8, and with
Transformer Engine.

Legend: M tokens, D width, F width of the MLP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from .env import measure
from .findings import Finding, at_least, at_most
from .fp8_teacher import teacher_figures, worst_error
from .settings import Settings, has_transformer_engine

SHAPES = {"qkv": (3584, 4608), "proj": (3584, 3584), "fc1": (3584, 37888), "fc2": (18944, 3584)}
"""(in, out) of a Qwen2-7B layer's matrices; fc1 is gate and up in one."""
SMALL_SHAPES = {"qkv": (256, 384), "proj": (256, 256), "fc1": (256, 1024), "fc2": (512, 256)}
E4M3_MAX = 448.0
SPEED_BAR, MEMORY_BAR, ERROR_BAR, STATE_BAR = 1.3, 0.55, 0.06, 0.2
CAPABILITY = (8, 9)

Work = Callable[[], torch.Tensor]


def gemm_figures(device: str, kind: Literal["torch", "te"] = "torch") -> dict[str, Any]:
    """Memory, seconds and relative errors of one 7B-like layer's GEMMs in FP8, against bf16.

    Args:
        device: cuda, or cpu for small shapes without seconds.
        kind: who multiplies in FP8; te needs a GPU.

    Returns:
        {"bytes": {"bf16", "fp8"} of the weights, "errors": {matrix: |off| / |bf16|}, "seconds": {"bf16", "fp8", "with
        quantising"} of all four}. With torch, fp8 is the product alone, and quantising the tokens is a few unfused passes; te
        has both in one figure. Seconds are empty where the hardware has no FP8.
    """
    is_cuda = device == "cuda"
    fast = is_cuda and torch.cuda.get_device_capability() >= CAPABILITY
    bytes_kept, errors, seconds = {"bf16": 0, "fp8": 0}, dict[str, float](), dict[str, float]()
    torch.manual_seed(0)
    for name, (width, out) in (SHAPES if is_cuda else SMALL_SHAPES).items():
        weight = (torch.randn(out, width, device=device) * width**-0.5).bfloat16()
        hidden = torch.randn(8192 if is_cuda else 64, width, device=device).bfloat16()
        works, of_weight = te_works(weight, hidden) if kind == "te" else torch_works(weight, hidden, fast)
        bytes_kept["bf16"] += weight.nbytes
        bytes_kept["fp8"] += of_weight
        expected = works["bf16"]()
        errors[name] = float((works["fp8"]().float() - expected.float()).norm() / expected.float().norm())
        for what, work in works.items() if fast else ():
            seconds[what] = seconds.get(what, 0.0) + measure(work, device)
    return {"bytes": bytes_kept, "errors": errors, "seconds": seconds}


def torch_works(weight: torch.Tensor, hidden: torch.Tensor, fast: bool) -> tuple[dict[str, Work], int]:
    """Products to time, and the bytes of the FP8 weight. Without the hardware FP8 is both operands rounded to e4m3, and a
    product in fp32."""
    stored, scale = quantise(weight)
    tokens, token_scale = quantise(hidden)

    def product(tokens: torch.Tensor, token_scale: torch.Tensor) -> torch.Tensor:
        if not fast:
            return (tokens.float() * token_scale) @ (stored.float() * scale).T
        return torch._scaled_mm(
            tokens, stored.T, scale_a=token_scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    works: dict[str, Work] = {
        "bf16": lambda: hidden @ weight.T,
        "fp8": lambda: product(tokens, token_scale),
        "with quantising": lambda: product(*quantise(hidden)),
    }
    return works, stored.nbytes + scale.nbytes


def quantise(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with one scale: (values, scale fp32), tensor ~ values x scale."""
    scale = (tensor.abs().amax().float() / E4M3_MAX).clamp_min(1e-12)
    return (tensor.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def te_works(weight: torch.Tensor, hidden: torch.Tensor) -> tuple[dict[str, Work], int]:
    """te.Linear with FP8 parameters and one scale a tensor, frozen: products to time, and the bytes that making it took."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    before = torch.cuda.memory_allocated()
    with torch.no_grad(), te.fp8_model_init(enabled=True, recipe=Float8CurrentScaling()):
        layer = te.Linear(weight.size(1), weight.size(0), bias=False, params_dtype=torch.bfloat16, device="cuda")
        layer.weight.copy_(weight)
    kept = torch.cuda.memory_allocated() - before

    @torch.no_grad()
    def product() -> torch.Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            return layer(hidden)

    return {"bf16": lambda: hidden @ weight.T, "fp8": product}, kept


def torch_alone(settings: Settings) -> Iterator[Finding]:
    """e4m3 storage and `torch._scaled_mm`."""
    yield from _held_against_bars("torch", settings)


def engine(settings: Settings) -> Iterator[Finding]:
    """Transformer Engine's layer."""
    if settings.is_cuda and has_transformer_engine() and torch.cuda.get_device_capability() >= CAPABILITY:
        yield from _held_against_bars("te", settings)
    else:
        yield Finding("te.Linear", "skip", "needs Transformer Engine and a GPU of compute capability 8.9 or more")


def teacher(settings: Settings) -> Iterator[Finding]:
    """The project's teacher against itself in bf16."""
    plain = teacher_figures(settings, "dtype")
    for linear in ("weight_only", "fp8"):
        if linear == "fp8" and not (
            settings.is_cuda and has_transformer_engine() and torch.cuda.get_device_capability() >= (9, 0)
        ):
            yield Finding("fp8 teacher", "skip", "needs Transformer Engine and a GPU of compute capability 9.0 or more")
            continue
        found = teacher_figures(settings, linear)
        ratio, note = found.num_bytes / plain.num_bytes, f"of {plain.num_bytes / 2**20:.3g} MiB"
        yield at_most(f"{linear} teacher, bytes of bf16", ratio, MEMORY_BAR, note)
        yield at_most(f"{linear} teacher, error of states", worst_error(found, plain), STATE_BAR, "worst layer")
        speed, times = plain.seconds / found.seconds, f"({plain.seconds * 1e3:.3g} and {found.seconds * 1e3:.3g} ms)"
        if linear == "fp8":
            yield at_least("fp8 teacher, speed of bf16", speed, SPEED_BAR, times)
        else:
            yield Finding("weight_only teacher, speed of bf16", "pass", f"{speed:.3g} {times}")


def _held_against_bars(kind: Literal["torch", "te"], settings: Settings) -> Iterator[Finding]:
    found = gemm_figures(settings.device, kind)
    (settings.out / f"fp8_{kind}.json").write_text(json.dumps(found, indent=1) + "\n")
    kept, errors, seconds = found["bytes"], found["errors"], found["seconds"]
    mib = f"of {kept['bf16'] / 2**20:.0f} MiB a layer"
    yield at_most(f"{kind} weights, fp8 / bf16", kept["fp8"] / kept["bf16"], MEMORY_BAR, mib)
    name = max(errors, key=lambda matrix: errors[matrix])
    yield at_most(f"{kind} GEMM error", errors[name], ERROR_BAR, f"({name})")
    if not seconds:
        yield Finding(
            f"{kind} GEMM speed", "skip", "needs a GPU of compute capability 8.9 or more", f">= {SPEED_BAR:g}"
        )
        return
    milliseconds = ", ".join(f"{what} {value * 1e3:.3g}" for what, value in seconds.items())
    yield at_least(
        f"{kind} GEMM speed, fp8 / bf16", seconds["bf16"] / seconds["fp8"], SPEED_BAR, f"({milliseconds} ms)"
    )


CHECKS = [torch_alone, engine, teacher]
