#!/usr/bin/env python
"""What the method adds to a step: taps, exchange and injected loss, against the same forward and backward passes without them.

    python tools/benchmark_exchange.py [--repeats 5] [--json FILE]

For growing depth, width and number of ranks, random Llama models run on CPU ranks of this machine, in one run, the two
kinds of step in turn (median of the repeats): `plain` is the teacher's forward and the student's forward and backward; `whole`
is the same with the representation loss on every layer at every response token. Reported are the share of `whole` that is
not in `plain`, the share that is spent in the exchange, and the bytes that travel, beside those of all supervised states and of
all states at full length. Times of a machine with more ranks than cores say little; the ratios are what this is for.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

TOKENS_A_SAMPLE, SAMPLES = 128, 8


@dataclass(frozen=True)
class Case:
    """Depth and width of both models, their layouts (`tp2sp pp2`), and ranks: shared, or the teacher's before the student's."""

    layers: int
    width: int
    teacher: str
    student: str
    ranks: int
    shared: bool = True

    def parallel(self, which: str) -> dict[str, Any]:
        """`ParallelConfig` values of one model."""
        text = self.teacher if which == "teacher" else self.student
        keys: dict[str, Any] = {match[1]: int(match[2]) for match in re.finditer(r"(tp|cp|pp|dp)(\d+)", text)}
        keys["sp"] = "sp" in text
        half = self.ranks // 2
        if not self.shared:
            keys["ranks"] = f"0-{half - 1}" if which == "teacher" else f"{half}-{self.ranks - 1}"
        return keys

    def __str__(self) -> str:
        where = "" if self.shared else ", disjoint"
        return f"{self.layers:2} layers, width {self.width}, {self.teacher} > {self.student}{where}"


CASES = [
    *(Case(layers, 256, "dp1", "dp1", 1) for layers in (4, 8, 16)),
    *(Case(4, width, "dp1", "dp1", 1) for width in (128, 512)),
    *(Case(layers, 256, "tp2sp", "pp2", 2) for layers in (4, 8, 16)),
    *(Case(4, width, "tp2sp", "pp2", 2) for width in (128, 512)),
    Case(8, 256, "pp2", "dp2", 2),
    Case(8, 256, "dp1", "dp1", 2, shared=False),
    Case(8, 256, "tp2sp pp2", "pp2 dp2", 4),
    Case(8, 256, "tp2", "pp2", 4, shared=False),
]


def make_models(folder: Path, case: Case) -> None:
    """Random weights in Hugging Face form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=case.layers, hidden_size=case.width, intermediate_size=3 * case.width, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=512, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / f"{case.layers}_{case.width}")


def measure(folder: Path, case: Case, repeats: int) -> dict[str, float]:
    """One case on this rank."""
    import torch
    import torch.distributed as dist

    from checkpoints_conversion import read_architecture
    from oprd_megatron.config.schema import DistillConfig, OptimizerConfig, ParallelConfig
    from oprd_megatron.models import build_model, run_schedule
    from oprd_megatron.optimizer import build_optimizer
    from oprd_megatron.parallel import resolve_layout
    from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
    from oprd_megatron.platform import select_platform
    from oprd_megatron.representation.alignment import Alignment
    from oprd_megatron.representation.batch import Sample
    from oprd_megatron.representation.feed import micro_batches
    from oprd_megatron.representation.flow import Passes

    platform, hf_dir = select_platform("cpu"), folder / f"{case.layers}_{case.width}"
    architecture, models = read_architecture(hf_dir), []
    for which, frozen in (("teacher", True), ("student", False)):
        layout = resolve_layout(
            ParallelConfig.model_validate(case.parallel(which)),
            name=which,
            world_size=case.ranks,
            num_layers=case.layers,
            divisible={},
        )
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        models.append(build_model(architecture, grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=frozen))
    teacher, student = models
    optimizer = build_optimizer(student, OptimizerConfig(), 10, platform) if student.grid.is_member else None
    wrapped = optimizer.chunks if optimizer else None
    alignment = Alignment(teacher, student, DistillConfig(positions="all"), platform, micro_batch_size=1)
    half = tuple(range(TOKENS_A_SAMPLE // 2))
    plan = alignment.plan([Sample(half, half)] * SAMPLES)

    def plain() -> float:
        for chunk in plan.chunks:
            fed = micro_batches([s.teacher_ids for s in chunk.samples], chunk.teacher.arrangement, teacher.grid)
            run_schedule(teacher, platform, fed, forward_only=True)
            fed = micro_batches([s.ids for s in chunk.samples], chunk.student.arrangement, student.grid)
            last = chunk is plan.chunks[-1]
            run_schedule(student, platform, fed, forward_only=False, chunks=wrapped, finalize=last)
        return 0.0

    def whole() -> float:
        waited = 0.0

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            nonlocal waited
            start = time.perf_counter()
            yield
            waited += time.perf_counter() - start if name == "exchange" else 0.0

        alignment.run(plan, Passes(train=True, chunks=wrapped, phase=phase))
        return waited

    seconds: dict[str, list[float]] = {"plain": [], "whole": [], "exchange": []}
    for repeat in range(repeats + 1):  # the first warms up
        for name, step in (("plain", plain), ("whole", whole)):
            if optimizer:
                optimizer.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            exchanged = step()
            dist.barrier()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
                if name == "whole":
                    seconds["exchange"].append(exchanged)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    states = plan.num_tokens * case.layers * alignment.wire.state_bytes
    return {
        "plain_seconds": medians["plain"],
        "whole_seconds": medians["whole"],
        "added": 1 - medians["plain"] / medians["whole"],
        "exchange": medians["exchange"] / medians["whole"],
        "sent_bytes": alignment.planned_bytes(plan),
        "supervised_bytes": states,
        "full_length_bytes": SAMPLES * TOKENS_A_SAMPLE * case.layers * case.width * 4,
    }


def rank_main(folder: Path, rank: int, cases: list[Case], repeats: int) -> None:
    """All cases of one world size, one after the other."""
    import torch
    import torch.distributed as dist

    from oprd_megatron.entry import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    world = cases[0].ranks
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    for number, case in enumerate(cases):
        store = f"file://{folder}/store_{world}_{number}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        result = measure(folder, case, repeats)
        if rank == 0:
            (folder / f"{world}_{number}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each kind.")] = 5,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """What taps, exchange and injected loss add to a step, as ratios, for growing depth, width and ranks."""
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in {(case.layers, case.width): case for case in CASES}.values():
            make_models(folder, case)
        typer.echo(
            f"{'case':46} {'added':>6} {'exchange':>8} {'sent MB':>8} {'of supervised':>13} {'of full length':>14}"
        )
        for world in sorted({case.ranks for case in CASES}):
            cases = [case for case in CASES if case.ranks == world]
            ranks = [context.Process(target=rank_main, args=(folder, rank, cases, repeats)) for rank in range(world)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            if any(process.exitcode for process in ranks):
                raise SystemExit(f"a rank of the cases with {world} ranks failed; its output is above")
            for number, case in enumerate(cases):
                result: dict[str, Any] = json.loads((folder / f"{world}_{number}.json").read_text())
                rows.append({**asdict(case), **result})
                sent = result["sent_bytes"]
                typer.echo(
                    f"{case!s:46} {result['added']:6.1%} {result['exchange']:8.1%} {sent / 1e6:8.2f} "
                    f"{sent / result['supervised_bytes']:13.0%} {sent / result['full_length_bytes']:14.0%}"
                )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
