"""Ranks that are slower than their peers, step by step.

What a rank spends in a phase without waiting for others (`Phases.own`) is compared among its peers: ranks that do the same
share of the same work, which are those at the same pipeline stage of the same model, or those that write text. Left out as
waiting are the exchange of states, messages between pipeline stages, the reduction of gradients, and what all ranks agree on.

What cannot be told from work is waiting inside of a layer (tp, cp): such a group is slow together, and its ranks show about the
same figures. On GPUs that also holds for pipeline stages, whose messages are part of the queued work.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from oprd_megatron.models import Model

PHASES = ("rollout", "swap", "teacher", "student")
STEPS = 5
"""A rank is called slow when it was the slowest of a phase in so many steps running, by the factor."""
LEAST_SECONDS = 0.05
"""Excess that is never worth a line."""

Peers = Mapping[str, Hashable]
"""{phase: what a rank has in common with its peers}; phases that it has no part in are missing."""


def peers_of(teachers: Sequence[Model], student: Model, writes: bool) -> dict[str, Hashable]:
    """This rank's peers; `writes`: it has a rollout engine."""
    stages = [teacher.grid.coords.pp if teacher.grid.is_member else None for teacher in teachers]
    found: dict[str, Hashable] = {}
    if any(stage is not None for stage in stages):
        found |= {"teacher": tuple(stages), "swap": tuple(stages)}
    if student.grid.is_member:
        found["student"] = student.grid.coords.pp
    return found | ({"rollout": True} if writes else {})


class Stragglers:
    """Follows all ranks of a run. Collective, once at the start: everybody's name and peers.

    Args:
        peers: of this rank.
        factor: times the median that is slow; None never warns.
    """

    def __init__(self, peers: Peers, factor: float | None) -> None:
        self.factor = factor
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (socket.gethostname(), dict(peers)))
        self.hosts = [host for host, _ in everyone]
        self.peers: list[Peers] = [of_rank for _, of_rank in everyone]
        self._streaks: dict[str, tuple[int, int]] = {}

    def record(self, own: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """One step. Collective: an all-gather of four numbers a rank.

        Returns:
            {phase: {"rank": the slowest compared with its peers, "seconds": its own, "excess": over the median of its
            peers}}; a phase that no two peers have is missing.
        """
        if len(self.hosts) == 1:
            return {}
        mine = torch.tensor([own.get(phase, math.nan) for phase in PHASES], dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in self.hosts]
        dist.all_gather(found, mine)
        seconds = torch.stack(found).T.tolist()
        slowest = {phase: self._slowest(phase, of_phase) for phase, of_phase in zip(PHASES, seconds, strict=True)}
        return {phase: worst for phase, worst in slowest.items() if worst is not None}

    def warnings(self, record: Mapping[str, Mapping[str, float]]) -> list[str]:
        """What there is to say after a step's `record`: a line for a rank that has just become slow."""
        lines = []
        for phase in PHASES:
            worst = record.get(phase)
            rank = -1
            if worst is not None and self.factor is not None and worst["excess"] > LEAST_SECONDS:
                median = worst["seconds"] - worst["excess"]
                rank = int(worst["rank"]) if worst["seconds"] > self.factor * median else -1
            before, steps = self._streaks.get(phase, (-1, 0))
            self._streaks[phase] = rank, steps + 1 if rank == before else 1
            if worst is not None and rank >= 0 and self._streaks[phase][1] == STEPS:
                lines.append(
                    f"slow rank: {self.hosts[rank]}:{rank} is the slowest in phase {phase} for {STEPS} steps running, now "
                    f"{worst['seconds']:.3g} s where the median of its peers is {worst['seconds'] - worst['excess']:.3g} s"
                )
        return lines

    def _slowest(self, phase: str, seconds: Sequence[float]) -> dict[str, float] | None:
        groups: dict[Hashable, list[tuple[float, int]]] = {}
        for rank, (of_rank, value) in enumerate(zip(self.peers, seconds, strict=True)):
            if phase in of_rank and not math.isnan(value):
                groups.setdefault(of_rank[phase], []).append((value, rank))
        worst = None
        for group in groups.values():
            value, rank = max(group)
            excess = value - statistics.median_low([other for other, _ in group])
            if len(group) > 1 and (worst is None or excess > worst["excess"]):
                worst = {"rank": rank, "seconds": value, "excess": excess}
        return worst
