"""What every layout must equal: Eq. 6 and three AdamW steps on transformers' models, one sample at a time, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oprd_megatron.config.schema import DistillConfig, OptimizerConfig
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.positions import supervised_positions
from tests.tiny_models import as_in_files

VOCAB = 300
STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_fraction=0.0, eps=1e-6, weight_decay=0.1, clip_grad=0.05)
"""Clipping is on: it needs the right norm over all ranks. Adam's eps is 1e-6: with 1e-8 it would scale rounding up."""


def batches() -> list[list[Sample]]:
    """A batch for each step: ragged prompts and responses, some without any."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6), (9, 2), (2, 11), (3, 3), (1, 1), (6, 8), (4, 4),
               (5, 0), (2, 5)]  # fmt: skip
    draw = lambda n: tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    return [[Sample(draw(prompt), draw(response)) for prompt, response in lengths] for _ in range(STEPS)]


@dataclass(frozen=True)
class Reference:
    """One process's result.

    Attributes:
        losses: of each step, before its update.
        norm: of the first gradient, before clipping.
        gradients: {HF name: first gradient}.
        parameters: {HF name: value after the last step}.
    """

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def write_bridge(path: Path, pairs: list[LayerPair], teacher_width: int, student_width: int, rank: int = 6) -> None:
    """A bridge of random projections."""
    generator = torch.Generator().manual_seed(9)
    draw = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    tensors = {}
    for pair in pairs:
        tensors[f"teacher.{pair.teacher_layer}.mean"] = draw(teacher_width)
        tensors[f"teacher.{pair.teacher_layer}.projection"] = draw(rank, teacher_width)
        tensors[f"student.{pair.student_layer}.projection"] = draw(rank, student_width)
    save_file(tensors, path)


def reference(teacher_dir: Path, student_dir: Path, distill: DistillConfig) -> Reference:
    """Train three steps."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (teacher_dir, student_dir)
    )
    pairs = resolve_layer_pairs(distill, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    bridge = load_file(distill.bridge) if distill.bridge else {}
    pre_norm: dict[object, torch.Tensor] = {}
    for model in (teacher, student):
        model.model.norm.register_forward_pre_hook(lambda _, inputs, model=model: pre_norm.update({model: inputs[0]}))
    trained = {name: p for name, p in student.named_parameters() if name != "lm_head.weight"}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps,
    )  # fmt: skip
    losses, first = [], {}
    norm = 0.0
    for step, samples in enumerate(batches()):
        optimizer.zero_grad()
        loss = _loss(samples, teacher, student, pairs, distill, bridge, pre_norm)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first = as_in_files(student, {name: p.grad for name, p in trained.items() if p.grad is not None})
        found = torch.nn.utils.clip_grad_norm_([p for p in trained.values() if p.grad is not None], OPTIMIZER.clip_grad)
        norm = norm or found.item()
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step + 1) / STEPS)).item())
        optimizer.step()
    return Reference(losses, norm, first, as_in_files(student, {name: p.detach() for name, p in trained.items()}))


def _loss(samples, teacher, student, pairs, distill, bridge, pre_norm):  # type: ignore[no-untyped-def]
    positions = [list(supervised_positions(len(s.prompt_ids), len(s.response_ids), distill)) for s in samples]
    count, total = sum(map(len, positions)), torch.zeros(())
    for sample, places in zip(samples, positions, strict=True):
        if not places:
            continue
        states = []
        for model in (teacher, student):
            output = list(model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states[1:])
            if distill.final_state == "pre_norm":
                output[-1] = pre_norm[model]
            states.append(output)
        for pair in pairs:
            h_t = states[0][pair.teacher_layer - 1][0, places].detach()
            h_s = states[1][pair.student_layer - 1][0, places]
            if bridge:
                h_t = (h_t - bridge[f"teacher.{pair.teacher_layer}.mean"]) @ bridge[
                    f"teacher.{pair.teacher_layer}.projection"
                ].T
                h_s = h_s @ bridge[f"student.{pair.student_layer}.projection"].T
            if distill.normalization == "l2":
                h_t, h_s = (torch.nn.functional.normalize(h, dim=-1) for h in (h_t, h_s))
            total = total + (h_s - h_t).square().mean(-1).sum() / len(pairs)
    return distill.coefficient * total / count
