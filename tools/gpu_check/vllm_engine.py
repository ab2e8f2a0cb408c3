"""One vLLM engine on a model of the project, its greedy tokens against transformers'.

The engine is in a process of its own (`vllm_tokens`), as it wants the GPU's memory and its own settings of torch. Both sides
compute in bf16 (on a CPU in fp32), where two next tokens may be nearly equal; after the first difference a text goes its own
way, so only tokens before it count as the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_hf_model

from .findings import Finding, at_least
from .settings import Settings

NEW_TOKENS, PROMPTS = 24, ([5, 9, 40, 41, 7], [100, 20, 33], list(range(10, 60)))
SAME_BAR = 0.9


def greedy_tokens(settings: Settings) -> Iterator[Finding]:
    """The share of tokens that are the same."""
    folder = settings.out / "vllm"
    folder.mkdir(exist_ok=True)
    model = settings.student or folder / "model"
    if settings.student is None:  # weights this large make one next token far likelier than the others
        tiny_hf_model("llama", model, num_layers=2, hidden_size=256, heads=4, kv_heads=2, ffn=512, std=0.12)
    request = folder / "request.json"
    request.write_text(
        json.dumps({"model": str(model), "prompts": PROMPTS, "tokens": NEW_TOKENS, "dtype": _dtype(settings)})
    )
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", f"{__package__}.vllm_tokens", str(request), str(answer)], check=False)
    if done.returncode or not answer.exists():
        yield Finding("engine", "FAIL", f"ended with code {done.returncode}; see {settings.out / 'vllm.log'}")
        return
    found = json.loads(answer.read_text())
    yield Finding("engine", "pass", f"vllm {found['version']}, ready in {found['seconds']:.0f} s")
    expected = by_transformers(model, settings)
    pairs = list(zip(found["tokens"], expected, strict=True))
    share = sum(same_prefix(mine, theirs) for mine, theirs in pairs) / sum(len(theirs) for _, theirs in pairs)
    yield at_least("greedy tokens", share, SAME_BAR, "the same as transformers'")


def by_transformers(model: Path, settings: Settings) -> list[list[int]]:
    """Greedy tokens, whatever the end-of-text token."""
    dtype = getattr(torch, _dtype(settings))
    loader: Any = AutoModelForCausalLM
    network = loader.from_pretrained(model, dtype=dtype).to(settings.device)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=settings.device)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
        texts.append(ids[0, len(prompt) :].tolist())
    return texts


def same_prefix(found: list[int], expected: list[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(found), len(expected)))


def _dtype(settings: Settings) -> str:
    return "bfloat16" if settings.is_cuda else "float32"


CHECKS = [greedy_tokens]
