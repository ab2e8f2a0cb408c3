"""The update benchmark (tools/bench_update.py) at the paper's shape, against the bars and against the measured ceiling.

Useful work is counted by formula, the same for every arm, so that arms compare: the student's forward and backward through its
layers, without heads, losses and recomputation. For a sequence of P tokens, with N parameters in the layers' matrices, L layers
and width D:

    forward     2 P N + 2 L P^2 D        matrices; causal scores and their product with the values (half of 4 L P^2 D)
    update      3 x forward              backward does it twice

The benchmark keeps all activations; it has no recomputation.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from .env import gemm_flops
from .findings import Finding, at_least, at_most
from .settings import CHECKOUT, Settings

PEAK_OF_RELEASE, PEAK_OF_TOP_K, TIME_OF_TOP_K = 0.34, 0.9, 0.92
SHARE_OF_CEILING = 0.45
TOKENS_THAT_FIT = ((120, 16_384), (70, 8_192), (45, 2_048))
"""(GiB of the GPU, response tokens of the 1.5B shape that fit there). Resident are 36 GiB: two models, gradients, AdamW."""
ROUNDS = 2


def first_terms(settings: Settings) -> Iterator[Finding]:
    """OPRD, top-16 and the release, which the bars are about."""
    yield from _bench(settings, "topk", ROUNDS, judged=True)


def other_terms(settings: Settings) -> Iterator[Finding]:
    """Sampled and full, one round, for the record. In a run of their own, so that the bars stand if time runs out."""
    yield from _bench(settings, "sampled,full", 1, judged=False)


def _bench(settings: Settings, terms: str, rounds: int, judged: bool) -> Iterator[Finding]:
    shape = shape_options(settings)
    if not shape:
        yield Finding("update", "skip", f"needs {TOKENS_THAT_FIT[-1][0]} GiB on the GPU")
        return
    out = settings.out / ("bench" if judged else "bench_other_terms")
    command = [
        sys.executable, str(CHECKOUT / "tools" / "bench_update.py"), *shape, "--terms", terms, "--rounds", str(rounds),
        "--device", settings.device, "--no-sweeps", "--recompute", "selective", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, check=False)
    if done.returncode:
        yield Finding("bench_update", "FAIL", f"ended with code {done.returncode}; see {settings.out / 'bench.log'}")
        return
    (result,) = json.loads((out / "update.json").read_text())["cases"]
    ceiling = gemm_flops(settings.device)
    yield Finding("shape", "pass", f"{result['name']}; {result['resident_bytes'] / 2**30:.1f} GiB resident")
    arms = result["arms"] if judged else {arm: of for arm, of in result["arms"].items() if "-" in arm}
    for arm, of in arms.items():
        yield arm_finding(arm, of, update_flops(result), ceiling)
    wrong = [line for line in (out / "update.md").read_text().splitlines() if line.startswith("- WRONG")]
    pairs = "ours and the usual way: losses and gradient norms"
    yield Finding("arms agree", "FAIL" if wrong else "pass", wrong[0].removeprefix("- WRONG: ") if wrong else pairs)
    if judged and settings.is_cuda:
        yield from bars(result, ceiling)
    elif judged:
        yield Finding("bars", "skip", "they are for a GPU and 16-bit models of 1.5B")


def shape_options(settings: Settings) -> list[str]:
    """The paper's shape, with shorter responses where memory is short; tiny on a CPU; nothing if none fits."""
    if not settings.is_cuda:
        return ["--shape", "tiny"]
    total = torch.cuda.mem_get_info(0)[1] / 2**30
    fitting = [tokens for gib, tokens in TOKENS_THAT_FIT if total >= gib]
    return ["--shape", "paper", "--response-tokens", str(fitting[0])] if fitting else []


def update_flops(result: dict[str, Any]) -> float:
    """Useful work of one update by the formula above. Of a layer: q and o [D, D], k and v [D, kv], the MLP's three."""
    case = result["case"]
    layers, width = case["layers"], case["width"]
    heads = width // 128 if width >= 256 else 4
    ffn = 35 * width // 6
    matrices = layers * (2 * width**2 + 2 * width * (2 * width // heads) + 3 * width * ffn)
    lengths = [case["prompt"] + tokens for tokens in result["tokens"]]
    return sum(3 * (2 * length * matrices + 2 * layers * length**2 * width) for length in lengths)


def arm_finding(arm: str, of: dict[str, Any], flops: float, ceiling: float) -> Finding:
    """Peak, seconds and useful work of an arm, or why there is none."""
    if "failed" in of:
        return Finding(arm, "FAIL" if arm.startswith("o") else "skip", of["failed"])  # oprd and opd-* are ours
    achieved = flops / of["update_seconds"]
    return Finding(
        arm, "pass",
        f"peak {of['peak_bytes'] / 2**30:.3g} GiB, update {of['update_seconds']:.3g} s, teacher {of['teacher_seconds']:.3g} s, "
        f"optimizer {of['optimizer_seconds']:.3g} s, {achieved / 1e12:.3g} TFLOP/s, {achieved / ceiling:.0%} of the ceiling",
    )  # fmt: skip


def bars(result: dict[str, Any], ceiling: float) -> Iterator[Finding]:
    """The figures that are asked for."""
    for check, other, figure, bar in (
        ("peak, oprd / release", "release", "peak_bytes", PEAK_OF_RELEASE),
        ("peak, oprd / opd-topk", "opd-topk", "peak_bytes", PEAK_OF_TOP_K),
        ("update time, oprd / opd-topk", "opd-topk", "update_seconds", TIME_OF_TOP_K),
    ):
        if "failed" in result["arms"][other] or "failed" in result["arms"]["oprd"]:
            yield Finding(check, "skip", "one of them did not fit", f"<= {bar:g}")
        else:
            yield at_most(check, ratio(result["arms"], "oprd", other, figure), bar)
    if "failed" not in result["arms"]["oprd"]:
        achieved = update_flops(result) / result["arms"]["oprd"]["update_seconds"]
        yield at_least(
            "oprd update, of the ceiling", achieved / ceiling, SHARE_OF_CEILING, f"of {ceiling / 1e12:.0f} TFLOP/s"
        )


def ratio(arms: dict[str, Any], arm: str, other: str, figure: str) -> float:
    """The median over rounds of an arm's figure over another's in the same round."""
    pairs = zip(arms[arm]["rounds"], arms[other]["rounds"], strict=False)
    return statistics.median(mine[figure] / theirs[figure] for mine, theirs in pairs)


CHECKS = [first_terms, other_terms]
