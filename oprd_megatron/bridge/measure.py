"""How good a bridge is on rows that its fit did not see, for every rank at once (the paper's Figure 12).

    cosine              of P_S h_S and P_T (h_T - mu), which stage 2 goes on to raise
    explained variance  share of |h_T - mu|^2 that the teacher's directions keep
    inside              share of |h_S|^2 that the student's projection sees; what falls when the student drifts

A low rank is easy to predict and keeps little; a high one keeps much of which the student knows little.

Legend: N rows of a call, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.bridge.fit import Batches, Stage1
from oprd_megatron.representation.bridge import LINEAR, Bridge
from oprd_megatron.representation.layer_map import LayerPair

GOOD_ENOUGH = 0.01
"""A rank whose mean held-out cosine is this near the best is as good."""


@dataclass(frozen=True)
class HeldOutFigures:
    """Per rank and pair: [K, P] float64 each, the same on all ranks.

    Attributes:
        ranks: the K ranks, ascending.
        cosine, explained, inside: as above; `inside` is 0 for an MLP.
    """

    ranks: list[int]
    cosine: np.ndarray
    explained: np.ndarray
    inside: np.ndarray

    def recommended(self) -> int:
        """The largest rank whose cosine, averaged over pairs, is within `GOOD_ENOUGH` of the best: of the ranks that the
        student can follow, the one that keeps most of the teacher."""
        means = self.cosine.mean(1)
        return max(rank for rank, mean in zip(self.ranks, means, strict=True) if mean >= means.max() - GOOD_ENOUGH)


def ranks_to_measure(most: int, wanted: int | None) -> list[int]:
    """1, 2, 4, .. up to `most`, and the wanted one."""
    powers = [2**power for power in range(most.bit_length()) if 2**power <= most]
    return sorted({*powers, *([wanted] if wanted else [])})


def measure(stage: Stage1, batches: Batches, bridge: Bridge, ranks: Sequence[int]) -> HeldOutFigures:
    """Pass 3. Collective over the world: both models over the batches, and one all-reduce of a few numbers.

    Args:
        stage: of the fit.
        batches: held-out rows.
        bridge: with at least as many directions as the largest rank.
        ranks: ascending.
    """
    pairs, directions = list(stage.pairs), bridge.rank
    place = {pair.student_layer: number for number, pair in enumerate(pairs)}
    teacher_place = {layer: number for number, layer in enumerate(bridge.means)}
    device = stage.platform.device
    upto = torch.tensor(ranks, device=device) - 1
    student = torch.zeros(3, len(pairs), len(ranks), dtype=torch.float64, device=device)  # cosine, inside, rows
    teacher = torch.zeros(len(teacher_place), directions + 1, dtype=torch.float64, device=device)
    bases = {layer: _bases(parts, ranks) for layer, parts in bridge.student.items()}

    def project(layer: int, states: torch.Tensor) -> torch.Tensor:
        projected = bridge.project_teacher(layer, states)
        kept = projected.double().square().sum(0)
        total = (states.float() - bridge.means[layer]).double().square().sum()
        teacher[teacher_place[layer]] += torch.cat([kept, total.unsqueeze(0)])
        return projected

    def on_rows(layer: int, states: torch.Tensor, targets: torch.Tensor, tokens: np.ndarray) -> None:
        found = bridge.project_student(layer, states)
        dot, mine, theirs = (
            (a * b).double().cumsum(1)[:, upto] for a, b in ((found, targets), (found, found), (targets, targets))
        )
        cosine = dot / (mine * theirs).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        student[0, place[layer]] += cosine.sum(0)
        student[2, place[layer]] += len(states)
        square = states.double().square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        for column, basis in enumerate(bases[layer]):
            student[1, place[layer], column] += ((states @ basis).double().square().sum(1) / square).sum()

    stage.run(batches, bridge, project, on_rows)
    for table in (student, teacher):
        dist.all_reduce(table)
    cosine, inside = (student[:2] / student[2]).transpose(1, 2).cpu().numpy()
    shares = (teacher[:, :-1].cumsum(1)[:, upto] / teacher[:, -1:]).T.cpu().numpy()
    explained = shares[:, [teacher_place[pair.teacher_layer] for pair in pairs]]
    return HeldOutFigures(list(ranks), cosine, explained, inside)


def curve_table(figures: HeldOutFigures, pairs: Sequence[LayerPair]) -> str:
    """Means and worst pair for every rank, as text."""
    lines = [f"{'rank':>6}{'cosine':>10}{'worst pair':>24}{'explained variance':>22}"]
    for number, rank in enumerate(figures.ranks):
        worst = int(figures.cosine[number].argmin())
        pair = f"{figures.cosine[number, worst]:.4f} ({pairs[worst].student_layer} <- {pairs[worst].teacher_layer})"
        explained = figures.explained[number].mean()
        lines.append(f"{rank:>6}{figures.cosine[number].mean():>10.4f}{pair:>24}{explained:>22.4f}")
    return "\n".join(lines)


def _bases(parts: dict[str, torch.Tensor], ranks: Sequence[int]) -> list[torch.Tensor]:
    """Orthonormal columns [D_S, r] that span what the first r rows of a linear P_S see, for each rank; none for an MLP."""
    if LINEAR not in parts:
        return []
    return [torch.linalg.qr(parts[LINEAR][:rank].T)[0] for rank in ranks]
