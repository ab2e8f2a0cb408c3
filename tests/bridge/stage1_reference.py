"""Stage 1 in numpy, in float64, one sample at a time, on transformers' hidden states; and the tiny pair that it is tried on.

The teacher is 64 wide and 6 layers deep, the student 32 wide and 4 deep. Both embed codes of the tokens, the student its own
version of the teacher's, so that one tells of the other, but not all; the codes have a falling spectrum, so that the leading
principal directions are well apart and rounding of fp32 states turns them by little.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.representation.batch import Sample
from tests.tiny_models import tiny_hf_model

VOCAB = 300
WIDTHS = {"teacher": 64, "student": 32}
DEPTHS = {"teacher": 6, "student": 4}
LAYER_MAP = {1: 2, 2: 4, 3: 4, 4: 6}
"""One teacher layer teaches two student layers, which pipeline parallelism puts on two stages."""
RANKS = [1, 2, 4, 8]
DECAY = 0.75
"""Ratio of the codes' standard deviations along successive directions."""


def make_pair(folder: Path) -> None:
    """Write both models and prompt files to `folder`."""
    generator, size = torch.Generator().manual_seed(10), WIDTHS["student"]
    codes = torch.randn(VOCAB, size, generator=generator) * 2 * torch.clamp(DECAY ** torch.arange(size), min=0.1) + 0.1
    for seed, name in enumerate(("teacher", "student"), 1):
        model = tiny_hf_model(
            "qwen2", folder / name, num_layers=DEPTHS[name], hidden_size=WIDTHS[name], heads=8, kv_heads=4, ffn=96,
            vocab_size=VOCAB, std=0.05, seed=seed, tied=False,
        )  # fmt: skip
        turn = torch.linalg.qr(torch.randn(WIDTHS[name], WIDTHS[name], generator=generator))[0]
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(codes @ turn[:size])
        codes = codes + 0.8 * torch.randn(VOCAB, size, generator=generator)
        model.save_pretrained(folder / name)
    lines = [json.dumps({"prompt": f"say {number}"}) for number in range(12)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def pair_run(folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of that pair; `sections` are merged in."""
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "steps": 6, "micro_batch_size": 2, "device": "cpu", "seed": 5},
        "teacher": {"path": str(folder / "teacher"), "dtype": "fp32"},
        "student": {"path": str(folder / "student"), "dtype": "fp32"},
        "rollout": {
            "prompts": {"path": str(folder / "train.jsonl")},
            "prompts_per_step": 2,
            "responses_per_prompt": 2,
            "max_response_tokens": 8,
        },
        "distill": {"layer_map": LAYER_MAP},
        "optimizer": {"lr": 1e-3, "eps": 1e-6, "warmup_fraction": 0.0},
        "logging": {"progress": False, "tensorboard": False},
        "bridge": {"rank": RANKS[-1], "max_rank": RANKS[-1], "held_out": 0.25},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def ragged_batches(count: int = 3, seed: int = 3) -> list[list[Sample]]:
    """Batches of eight rollouts, two without a response."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist())  # noqa: E731
    lengths = [(5, 7), (3, 1), (8, 22), (6, 0), (4, 13), (1, 16), (7, 0), (2, 15)]
    return [[Sample(draw(prompt), draw(response)) for prompt, response in lengths] for _ in range(count)]


@dataclass(frozen=True)
class Directions:
    """Of one teacher layer: mean [D], basis [R, D], variances [R]."""

    mean: np.ndarray
    basis: np.ndarray
    variances: np.ndarray


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a model's tensors in place, by their names in its file."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def freeze_dimension(tensors: dict[str, torch.Tensor]) -> None:
    """Dimension 7 of every state becomes 0."""
    tensors["model.embed_tokens.weight"][:, 7] = 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[7] = 0


def positions_of(sample: Sample, distill: DistillConfig) -> list[int]:
    """Supervised positions of a rollout, written out from the convention: y_t sits at prompt + t - 1."""
    prompt, response = len(sample.prompt_ids), len(sample.response_ids)
    at = [prompt + t - 1 for t in range(1, response + 1)]
    if distill.positions == "last_k":
        at = at[-min(distill.k, response) :] if response else []
    if distill.position_anchor == "predictor":
        at = [position - 1 for position in at if position >= 1]
    return at if sample.kept is None else [at[index] for index in sample.kept]


def states_of(
    folder: Path, batches: Sequence[Sequence[Sample]], distill: DistillConfig
) -> dict[tuple[str, int], np.ndarray]:
    """{(model, layer): rows [N, D] float64}, sample by sample in order, of transformers in fp32."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for name in ("teacher", "student"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        pre_norm: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, inputs, kept=pre_norm: kept.append(inputs[0]))
        for samples in batches:
            for sample in samples:
                places = positions_of(sample, distill)
                if not places:
                    continue
                with torch.no_grad():
                    hidden = list(model.model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states)
                if distill.final_state == "pre_norm":
                    hidden[-1] = pre_norm[-1]
                for layer in range(1, DEPTHS[name] + 1):
                    found.setdefault((name, layer), []).append(hidden[layer][0, places].double().numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def directions_of(rows: np.ndarray, rank: int) -> Directions:
    """Principal directions by a singular value decomposition of the centred rows; no covariance is formed."""
    mean = rows.mean(0)
    _, singular, right = np.linalg.svd(rows - mean, full_matrices=False)
    basis = right[:rank].copy()
    for direction in basis:
        if direction[np.abs(direction).argmax()] < 0:
            direction *= -1
    return Directions(mean, basis, singular[:rank] ** 2 / (len(rows) - 1))


def sine(basis: np.ndarray, other: np.ndarray) -> float:
    """Of the largest principal angle between the spans of orthonormal rows [R, D] each."""
    return float(np.linalg.norm(other - other @ basis.T @ basis, ord=2))


def targets_of(rows: np.ndarray, directions: Directions) -> np.ndarray:
    return (rows - directions.mean) @ directions.basis.T


def objective(projection: np.ndarray, rows: np.ndarray, targets: np.ndarray, strength: float) -> float:
    """Sum |P x - y|^2 + strength * (mean square of x's numbers) * N * |P|^2."""
    penalty = strength * (rows**2).mean() * len(rows)
    return float(((rows @ projection.T - targets) ** 2).sum() + penalty * (projection**2).sum())


def ridge_of(rows: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """Its minimum [R, D], by least squares with sqrt(penalty) I stacked under the rows; no moments are formed."""
    penalty = strength * (rows**2).mean() * len(rows)
    stacked = np.vstack([rows, np.sqrt(penalty) * np.eye(rows.shape[1])])
    wanted = np.vstack([targets, np.zeros((rows.shape[1], targets.shape[1]))])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0].T


def held_out_figures(
    teacher: np.ndarray, student: np.ndarray, directions: Directions, projection: np.ndarray, rank: int
) -> tuple[float, float, float]:
    """(cosine, explained variance, inside) of the first `rank` directions, row by row."""
    basis, kept = directions.basis[:rank], projection[:rank]
    seen = np.linalg.svd(kept, full_matrices=False)[2]
    cosines, insides, explained, total = [], [], 0.0, 0.0
    for h_t, h_s in zip(teacher, student, strict=True):
        y, x = basis @ (h_t - directions.mean), kept @ h_s
        cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
        insides.append(np.linalg.norm(seen @ h_s) ** 2 / np.linalg.norm(h_s) ** 2)
        explained += float(y @ y)
        total += float(np.linalg.norm(h_t - directions.mean) ** 2)
    return float(np.mean(cosines)), explained / total, float(np.mean(insides))
