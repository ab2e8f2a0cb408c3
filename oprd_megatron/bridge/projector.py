"""The student's projector by gradient descent: the paper's recipe for Eq. 13, and the MLP, which has no closed form.

Runs on one rank with all rows of a layer (bridge.rows of them at most), in the order of their tokens, so that the result does
not depend on the layout.

Legend: N rows, D width, R targets, H width of the MLP.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import mse_loss

from oprd_megatron.config.schema import BridgeConfig
from oprd_megatron.representation.bridge import LINEAR, project


def part_shapes(config: BridgeConfig, width: int, targets: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a projector's tensors."""
    if config.projector == "linear":
        return {LINEAR: (targets, width)}
    hidden = config.mlp_width
    return {
        "fc1.weight": (hidden, width),
        "fc1.bias": (hidden,),
        "fc2.weight": (targets, hidden),
        "fc2.bias": (targets,),
    }


def train_projector(
    rows: torch.Tensor, targets: torch.Tensor, config: BridgeConfig, seed: int
) -> dict[str, torch.Tensor]:
    """Adam over `epochs` passes with a learning rate that falls to 0 as a cosine.

    Args:
        rows: [N, D] fp32, the student's states.
        targets: [N, R] fp32, P_T (h_T - mu).
        config: the recipe.
        seed: of the first weights and the order of rows.

    Returns:
        The tensors of `part_shapes`, fp32 on the device of `rows`.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, shape in part_shapes(config, rows.size(1), targets.size(1)).items():
        bound = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.0
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parts[name] = drawn.to(rows.device).requires_grad_()
    updates = config.epochs * math.ceil(len(rows) / config.batch_rows)
    optimizer = torch.optim.Adam(parts.values(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(config.batch_rows):
            chosen = batch.to(rows.device)
            optimizer.zero_grad()
            mse_loss(project(parts, rows[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    return {name: part.detach() for name, part in parts.items()}
