"""Our models against transformers, our kernels against formulas, Transformer Engine's layers against our own.

Tolerances are relative errors by norms. In fp32 sums are taken in another order and nothing else differs. In bf16 both the
weights and every result have 8 bits: 0.4 % a rounding, some of which adds up over layers, and more of it in backward.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import UserError
from oprd_megatron.platform import Platform, init_distributed, select_platform

from .findings import Finding, at_least, at_most
from .kernels import TERMS, attention_off, term_off
from .models import FAMILIES, Figures, least_cosine, off, ours, reference, whole, worst, write_tiny
from .ranks import LAYOUTS, figures_on_two_ranks, terms_on_two_ranks
from .settings import Settings, has_transformer_engine

BARS = {
    "fp32": {"states": 1e-5, "logits": 1e-5, "gradients": 1e-4},
    "bf16": {"states": 0.03, "logits": 0.03, "gradients": 0.08},
}
KERNEL_BARS = {"fp32": 1e-5, "bf16": 0.03}
TE_COSINE = 0.999
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WINDOW = 50


@functools.cache
def world(device: str) -> Platform:
    """A world of this one process."""
    platform = select_platform("cuda" if device == "cuda" else "cpu")
    init_distributed(platform)
    return platform


@functools.cache
def prepared(family: str, device: str) -> tuple[Path, Figures]:
    """A tiny model's directory, gone at exit, and what transformers computes with it."""
    holder = tempfile.TemporaryDirectory(prefix="gpu_check_")
    HELD.append(holder)
    name, tied = next(of for of in FAMILIES if of[0] == family)
    write_tiny(Path(holder.name), name, tied)
    return Path(holder.name), reference(Path(holder.name), device)


HELD: list[tempfile.TemporaryDirectory[str]] = []


def local_spec(settings: Settings) -> Iterator[Finding]:
    """This project's own layers against transformers in fp32: hidden states of every layer, logits, gradients."""
    platform = world(settings.device)
    for family, _ in FAMILIES:
        folder, expected = prepared(family, settings.device)
        for name, dtype in DTYPES.items():
            errors = off(whole([ours(folder, platform, ParallelConfig(), dtype)]), expected)
            yield within(f"{family} {name}", errors, name)


def within(check: str, errors: dict[str, float], dtype: str) -> Finding:
    """Errors of states, logits and gradients in one line; each is held against its own bar."""
    bars = BARS[dtype]
    passed = all(error <= bars[what] for what, error in errors.items())
    told, asked = (", ".join(f"{what} {value:.2g}" for what, value in of.items()) for of in (errors, bars))
    return Finding(check, "pass" if passed else "FAIL", told, f"<= {asked}")


def packed_attention(settings: Settings) -> Iterator[Finding]:
    """Attention within the sequences of a pack, output and gradients, plain and with a window."""
    world(settings.device)
    for name, dtype in DTYPES.items():
        errors = [attention_off(settings.device, dtype, window) for window in (None, WINDOW)]
        yield at_most(f"packed attention {name}", worst(errors), KERNEL_BARS[name])


def output_terms(settings: Settings) -> Iterator[Finding]:
    """Output-space terms, values and gradients. In bf16 the top set is left out: rounded logits have another one."""
    world(settings.device)
    yield at_most(
        "output terms fp32",
        worst([term_off(name, settings.device, torch.float32) for name in TERMS]),
        KERNEL_BARS["fp32"],
        ", ".join(TERMS),
    )
    chosen = [name for name in TERMS if name != "topk"]
    errors = [term_off(name, settings.device, torch.bfloat16) for name in chosen]
    yield at_most("output terms bf16", worst(errors), KERNEL_BARS["bf16"], ", ".join(chosen))


def two_processes(settings: Settings) -> Iterator[Finding]:
    """TP 2 and PP 2 of a model with an untied head and biases, and terms on a split vocabulary, in fp32."""
    yield from _what_a_run_allows(settings)
    folder, expected = prepared("qwen2", settings.device)
    for layout in LAYOUTS:
        errors = off(figures_on_two_ranks(folder, layout, settings.device), expected)
        yield within(f"{layout} fp32", errors, "fp32")
    yield at_most("output terms fp32 tp2", terms_on_two_ranks(settings.device), KERNEL_BARS["fp32"])


def _what_a_run_allows(settings: Settings) -> Iterator[Finding]:
    """Two ranks of a run on one GPU: what `select_platform` says to it."""
    if not settings.is_cuda:
        return
    ranks = str(torch.cuda.device_count() + 1)
    with patch.dict(os.environ, LOCAL_WORLD_SIZE=ranks):
        try:
            select_platform("cuda")
            yield Finding("ranks on a GPU", "FAIL", f"{ranks} ranks were let in, though NCCL refuses two on one GPU")
        except UserError as error:
            yield Finding("ranks on a GPU", "pass", f"a run refuses two ({error}); below, two processes over gloo")


def engine_spec(settings: Settings) -> Iterator[Finding]:
    """mcore's Transformer Engine layers against our own, both in bf16 and with packed sequences."""
    if not (settings.is_cuda and has_transformer_engine()):
        reason = "Transformer Engine is absent" if settings.is_cuda else "Transformer Engine needs a GPU"
        yield Finding("TE spec", "skip", reason)
        return
    platform = world(settings.device)
    for family, _ in FAMILIES:
        folder, _ = prepared(family, settings.device)
        local, engine = (
            whole([ours(folder, platform, ParallelConfig(), torch.bfloat16, engine=te)]) for te in (False, True)
        )
        yield at_least(f"{family} TE spec, cosine", least_cosine(engine, local), TE_COSINE, "the lowest layer's")
        yield at_most(f"{family} TE spec, gradients", off(engine, local)["gradients"], BARS["bf16"]["gradients"])


CHECKS = [local_spec, packed_attention, output_terms, engine_spec, two_processes]
