"""What a run looks after while it trains, and says in one line each: bridges that the student drifts from, noise of a teacher's
rounding, slow ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from oprd_megatron.bridge.health import Health
from oprd_megatron.config import RunConfig
from oprd_megatron.logging import METRICS_FILE, read_records
from oprd_megatron.logging.memory import world_memory_mib
from oprd_megatron.models import Model
from oprd_megatron.noise.gate import NoiseGate, gate_from_file
from oprd_megatron.noise.measure import measured_gate, prompt_samples
from oprd_megatron.placing import PlacedTeacher
from oprd_megatron.platform import Platform
from oprd_megatron.representation.space import LowRank
from oprd_megatron.stragglers import Stragglers, peers_of
from oprd_megatron.trainer import Trainer

logger = logging.getLogger(__name__)


class Watch:
    """Follows a run from here on, and from what it has measured so far. Collective.

    Args:
        config: of the run.
        trainer: whose steps.
        teachers: all of them.
        student: on all ranks of the world.
        platform: of this rank.
    """

    def __init__(
        self, config: RunConfig, trainer: Trainer, teachers: Sequence[PlacedTeacher], student: Model, platform: Platform
    ) -> None:
        self._trainer, self._platform = trainer, platform
        self._health = bridges_of(config, teachers)
        self._gates = noise_gates(trainer, platform)
        peers = peers_of([teacher.model for teacher in teachers], student, writes=trainer.engine is not None)
        self._stragglers = Stragglers(peers, config.logging.slow_rank_factor)

    def step(self, record: dict[str, Any]) -> dict[str, Any]:
        """A train record with every rank's memory and the slowest ranks; warns. Collective."""
        slowest = self._stragglers.record(self._trainer.own_seconds)
        _warn([*noise_warnings(self._gates, record), *self._stragglers.warnings(slowest)])
        memory = world_memory_mib(self._platform.device)
        return {**record, "memory_mib": memory, **({"stragglers": slowest} if slowest else {})}

    def evaluation(self, record: dict[str, Any]) -> None:
        """Take in an eval record; warns."""
        _warn(bridge_warnings(self._health, record))


def bridges_of(config: RunConfig, teachers: Sequence[PlacedTeacher]) -> dict[str, Health]:
    """{teacher: what follows its bridge}, for teachers with one."""
    metrics = config.run.dir / METRICS_FILE
    health = {t.name: Health(config.bridge.warn_drop) for t in teachers if isinstance(t.space, LowRank)}
    for record in read_records(metrics) if health and metrics.exists() else []:
        if record["kind"] == "eval":
            bridge_warnings(health, record)
    return health


def bridge_warnings(health: dict[str, Health], record: dict[str, Any]) -> list[str]:
    """What there is to say about the bridges after an evaluation."""
    if "teachers" not in record:
        return [line for watch in health.values() for line in watch.warnings(record)]
    return [
        f"teacher {name}: {line}"
        for name, watch in health.items()
        if name in record["teachers"]
        for line in watch.warnings({**record["teachers"][name], "step": record["step"]})
    ]


def noise_gates(trainer: Trainer, platform: Platform) -> dict[str, NoiseGate]:
    """{teacher: what watches the noise of its rounding}, for teachers whose `precision.noise` asks for it. Collective."""
    gates = {}
    for lesson in trainer.lessons:
        checked = lesson.placed.checked
        precision = checked.config.teacher.precision
        if precision.noise_file is not None:
            gates[lesson.name] = gate_from_file(checked.config, lesson.alignment.pairs)
        elif precision.noise == "measure":
            with lesson.placed.at_work():
                samples = prompt_samples(checked)
                gates[lesson.name] = measured_gate(checked, lesson.alignment, samples, platform)
    return gates


def noise_warnings(gates: dict[str, NoiseGate], record: dict[str, Any]) -> list[str]:
    """What there is to say about rounding after a step."""
    of_teachers, found = record.get("teachers", {}), []
    for name, gate in gates.items():
        layers = of_teachers.get(name, {} if of_teachers else record).get("layers")
        whose = f"teacher {name}: " if of_teachers else ""
        found += [f"{whose}{line}" for line in (gate.warnings(layers, record["step"]) if layers else [])]
    return found


def _warn(lines: list[str]) -> None:
    for line in lines:
        logger.warning(line)
