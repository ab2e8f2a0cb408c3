"""What every layout must equal: Eq. 2 to 7 and 14 and three AdamW steps on transformers' models, one sample at a time, in one
process. Nothing of the code under test but the choice of layers and positions is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu, linear, normalize
from transformers import AutoModelForCausalLM

from oprd_megatron.config.output import FullTerm, OutputConfig, SampledTerm, Term, TopKTerm
from oprd_megatron.config.schema import DistillConfig, OptimizerConfig
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.positions import supervised_positions
from tests.parity.cases import BRIDGE_RANK, VOCAB
from tests.tiny_models import as_in_files

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
        map_gradients, maps: the same of the trained maps, {student layer: [D_T, D_S]}.
    """

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    map_gradients: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]


def write_bridge(path: Path, pairs: list[LayerPair], teacher_width: int, student_width: int, is_mlp: bool) -> None:
    """A bridge of random projections."""
    rank, hidden = BRIDGE_RANK, 10
    generator = torch.Generator().manual_seed(9)
    draw = lambda *shape: torch.randn(shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    tensors = {}
    for pair in pairs:
        tensors[f"teacher.{pair.teacher_layer}.mean"] = draw(teacher_width)
        tensors[f"teacher.{pair.teacher_layer}.projection"] = draw(rank, teacher_width)
        student = f"student.{pair.student_layer}"
        if is_mlp:
            tensors |= {f"{student}.fc1.weight": draw(hidden, student_width), f"{student}.fc1.bias": draw(hidden)}
            tensors |= {f"{student}.fc2.weight": draw(rank, hidden), f"{student}.fc2.bias": draw(rank)}
        else:
            tensors[f"{student}.projection"] = draw(rank, student_width)
    save_file(tensors, path)


def new_maps(pairs: list[LayerPair], teacher_width: int, student_width: int) -> dict[int, torch.nn.Parameter]:
    """The trained maps as they begin: the identity, or drawn from the layer's number."""
    maps = {}
    for pair in pairs:
        drawn = torch.rand(
            teacher_width,
            student_width,
            generator=torch.Generator().manual_seed(pair.student_layer),
            dtype=torch.float32,
        )
        start = torch.eye(student_width) if teacher_width == student_width else (2 * drawn - 1) / student_width**0.5
        maps[pair.student_layer] = torch.nn.Parameter(start)
    return maps


def weights_of(distill: DistillConfig, pairs: list[LayerPair], step: int) -> dict[int, float]:
    """{student layer: weight}, on the way from the first weights to the last ones."""
    ends = []
    for chosen in (distill.layer_weights, distill.final_layer_weights or distill.layer_weights):
        raw = chosen if isinstance(chosen, list) else [p.student_layer if chosen == "depth" else 1 for p in pairs]
        ends.append(torch.tensor(raw, dtype=torch.float64) / (sum(raw) / len(raw)))
    now = torch.lerp(*ends, step / (STEPS - 1))
    return {pair.student_layer: float(weight) for pair, weight in zip(pairs, now, strict=True)}


def at(schedule: float | list[tuple[float, float]], step: int) -> float:
    """A weight at a step, on a line without jumps."""
    if not isinstance(schedule, list):
        return schedule
    return float(np.interp(step / (STEPS - 1), *zip(*schedule, strict=True)))


def reference(teacher_dir: Path, student_dir: Path, distill: DistillConfig, output: OutputConfig) -> Reference:
    """Train three steps."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (teacher_dir, student_dir)
    )
    pairs = resolve_layer_pairs(distill, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    bridge = load_file(distill.bridge) if distill.bridge else {}
    maps = new_maps(pairs, teacher.config.hidden_size, student.config.hidden_size) if distill.mode == "linear" else {}
    pre_norm: dict[object, torch.Tensor] = {}
    for model in (teacher, student):
        model.model.norm.register_forward_pre_hook(lambda _, inputs, model=model: pre_norm.update({model: inputs[0]}))
    trained = {name: p for name, p in student.named_parameters() if output.terms or name != "lm_head.weight"}
    matrices = [p for p in trained.values() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [*matrices, *maps.values()], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps,
    )  # fmt: skip
    losses, first, first_of_maps = [], {}, {}
    norm = 0.0
    for step, samples in enumerate(batches()):
        optimizer.zero_grad()
        loss = torch.zeros(())
        if distill.mode != "none" and at(distill.coefficient, step):
            weights = weights_of(distill, pairs, step)
            spaces = {"bridge": bridge, "maps": maps, "weights": weights}
            loss = at(distill.coefficient, step) * _loss(samples, teacher, student, pairs, distill, pre_norm, **spaces)
        if output.terms:
            loss = loss + _output_terms(samples, teacher, student, output.terms, step)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            first = as_in_files(student, {name: p.grad for name, p in trained.items() if p.grad is not None})
            first_of_maps = {
                layer: torch.zeros_like(w) if w.grad is None else w.grad.clone() for layer, w in maps.items()
            }
        every = [*trained.values(), *maps.values()]
        found = torch.nn.utils.clip_grad_norm_([p for p in every if p.grad is not None], OPTIMIZER.clip_grad)
        norm = norm or found.item()
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step + 1) / STEPS)).item())
        optimizer.step()
    parameters = as_in_files(student, {name: p.detach() for name, p in trained.items()})
    return Reference(
        losses, norm, first, parameters, first_of_maps, {layer: w.detach().clone() for layer, w in maps.items()}
    )


def _loss(  # type: ignore[no-untyped-def]
    samples: list[Sample],
    teacher,
    student,
    pairs: list[LayerPair],
    distill: DistillConfig,
    pre_norm: dict[Any, torch.Tensor],
    bridge: dict[str, torch.Tensor],
    maps: dict[int, torch.nn.Parameter],
    weights: dict[int, float],
) -> torch.Tensor:
    """Eq. 6 and 14, and their kin, with layer weights."""
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
                mean, basis = (bridge[f"teacher.{pair.teacher_layer}.{part}"] for part in ("mean", "projection"))
                h_t = ((h_t - mean) @ basis.T)[:, distill.bridge_head :]
                h_s = _projected(bridge, f"student.{pair.student_layer}", h_s)[:, distill.bridge_head :]
            if maps:
                h_s = h_s @ maps[pair.student_layer].T
            if distill.normalization == "l2":
                h_t, h_s = normalize(h_t, dim=-1), normalize(h_s, dim=-1)
            total = total + weights[pair.student_layer] * (h_s - h_t).square().mean(-1).sum() / len(pairs)
    return total / count


def _projected(bridge: dict[str, torch.Tensor], name: str, states: torch.Tensor) -> torch.Tensor:
    """P_S h_S, or the MLP."""
    if f"{name}.projection" in bridge:
        return states @ bridge[f"{name}.projection"].T
    hidden = gelu(linear(states, bridge[f"{name}.fc1.weight"], bridge[f"{name}.fc1.bias"]))
    return linear(hidden, bridge[f"{name}.fc2.weight"], bridge[f"{name}.fc2.bias"])


def _output_terms(samples: list[Sample], teacher, student, terms: list[Term], step: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Eq. 2 to 5: the weighted sum of each term's mean over the response tokens that it supervises, over the ids that both
    models have. In float64 from the logits on."""
    values: list[list[torch.Tensor]] = [[] for _ in terms]
    for sample in samples:
        first, length = len(sample.prompt_ids) - 1, len(sample.response_ids)
        if not length:
            continue
        ids, drawn = torch.tensor([sample.ids]), torch.tensor(sample.response_ids)
        z_q, z_p = (model(ids).logits[0, first : first + length, :VOCAB].double() for model in (teacher, student))
        for term, found in zip(terms, values, strict=True):
            most = {"all": length, "last": 1}.get(term.positions, term.first_or_last)
            kept = slice(0, most) if term.positions == "first_k" else slice(max(0, length - most), length)
            log_p, log_q = (z[kept] / term.temperature for z in (z_p, z_q.detach()))
            found.append(_value(term, log_p.log_softmax(-1), log_q.log_softmax(-1), drawn[kept]))
    return sum(at(term.weight, step) * torch.cat(found).mean() for term, found in zip(terms, values, strict=True))


def _value(term: Term, log_p: torch.Tensor, log_q: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A term on n tokens from log-probabilities [n, V], so that autograd gives the gradient that it should have: [n]."""
    if isinstance(term, SampledTerm):
        mine, theirs = (log.gather(-1, drawn[:, None])[:, 0] for log in (log_p, log_q))
        ratio = mine - theirs
        if term.estimator == "policy_gradient":  # value r; gradient r times that of log p, r held constant
            return ratio.detach() + ratio.detach() * (mine - mine.detach())
        return ratio**2 / 2 if term.estimator == "k2" else (theirs - mine).exp() - 1 + ratio
    if isinstance(term, TopKTerm):
        return _on_a_set(term, log_p, log_q)
    assert isinstance(term, FullTerm)
    p, q = log_p.exp(), log_q.exp()
    if term.divergence == "reverse":
        return (p * (log_p - log_q)).sum(-1)
    if term.divergence == "forward":
        return (q * (log_q - log_p)).sum(-1)
    share = term.mixing
    log_m = (share * p + (1 - share) * q).log()
    return share * (p * (log_p - log_m)).sum(-1) + (1 - share) * (q * (log_q - log_m)).sum(-1)


def _on_a_set(term: TopKTerm, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Reverse KL on a set of ids, which is a constant: a mask over the vocabulary."""
    tops = [
        torch.zeros_like(log, dtype=torch.bool).scatter(-1, log.topk(term.k).indices, True) for log in (log_p, log_q)
    ]
    mask = {"student": tops[0], "teacher": tops[1], "intersection": tops[0] & tops[1], "union": tops[0] | tops[1]}[
        term.support
    ]
    p, q = ((log.exp() * mask) for log in (log_p, log_q))
    if term.rest == "tail":
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    else:
        p, q = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (p, q))
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)
