"""Three places where a tap is easily wrong: several micro-batches in flight, a layer recomputed in backward, the final norm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints_conversion import read_architecture
from oprd_megatron.config.schema import DistillConfig, ParallelConfig, RecomputeConfig
from oprd_megatron.models import build_model
from oprd_megatron.parallel import resolve_layout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.injection import Aligner
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

LAYERS = 4
UNEVEN = [Sample((1, 2, 3), tuple(range(4, 4 + length))) for length in (3, 9, 1, 6, 2, 8)]
"""Micro-batches of one sample; no two have equally many supervised tokens, so that a swapped micro-batch shows."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spots")
    for seed, name in enumerate(("teacher", "student"), 1):
        tiny_hf_model("llama", folder / name, num_layers=LAYERS, std=0.1, seed=seed)
    return folder


def traced(
    folder: Path, parallel: ParallelConfig, recompute: RecomputeConfig, distill: DistillConfig
) -> dict[str, Any]:
    """One training pass on this rank, with every call of the student's tap and every injected gradient written down."""
    platform, built = select_platform("cpu"), []
    for name in ("teacher", "student"):
        architecture = read_architecture(folder / name)
        layout = resolve_layout(
            parallel, name=name, world_size=dist.get_world_size(), num_layers=LAYERS, divisible={}
        )  # fmt: skip
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, grid.coords.tp)
        built.append(
            build_model(
                architecture, grid, platform, dtype=torch.float32, hf_dir=folder / name, frozen=name == "teacher",
                recompute=recompute if name == "student" else None,
            )
        )  # fmt: skip
    alignment = Alignment(built[0], built[1], distill, platform, micro_batch_size=1)
    calls, injected, open_now, most_open = [], [], set(), 0
    on_state, gradients = Aligner.on_state, Aligner.gradients

    def watch(self: Aligner, layer: int, micro_batch: int, hidden: torch.Tensor) -> torch.Tensor | None:
        nonlocal most_open
        calls.append((layer, micro_batch, torch.is_grad_enabled(), hidden.size(0)))
        open_now.add((layer, micro_batch))
        most_open = max(most_open, max(Counter(layer for layer, _ in open_now).values()))
        return on_state(self, layer, micro_batch, hidden)

    def count(self: Aligner, layer: int, micro_batch: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        injected.append((layer, micro_batch, hidden.size(0)))
        open_now.discard((layer, micro_batch))
        return gradients(self, layer, micro_batch, hidden)

    Aligner.on_state, Aligner.gradients = watch, count
    sums = alignment.run(alignment.plan(UNEVEN), train=True)
    Aligner.on_state, Aligner.gradients = on_state, gradients
    gradients = torch.cat(
        [p.grad.flatten() for chunk in built[1].chunks for p in chunk.parameters() if p.grad is not None]
    )
    return {
        "calls": calls, "injected": injected, "most_open": most_open, "rows": {k: float(v[-1]) for k, v in sums.items()},
        "report": alignment.reduce(sums), "norm": gradients.square().sum(),
    }  # fmt: skip


NONE, FULL = RecomputeConfig(), RecomputeConfig(granularity="full")


@pytest.mark.parametrize("recompute", [NONE, FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("parallel", [ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2)], ids=["pp2", "vpp2"])
def test_several_micro_batches_in_flight(models: Path, parallel: ParallelConfig, recompute: RecomputeConfig) -> None:
    """The first stage has gone forward through several micro-batches before the first comes back; each state and gradient is
    that of its own micro-batch (known by its length), also where the layer is recomputed when another went forward last."""
    first, last = run_ranks(2, traced, models, parallel, recompute, DistillConfig(positions="all"))
    assert first["most_open"] >= 2
    for rank in (first, last):
        for layer, micro_batch, *_, length in [*rank["calls"], *rank["injected"]]:
            assert length == len(UNEVEN[micro_batch].ids), (layer, micro_batch)
        assert Counter(rank["injected"]) == Counter({key: 1 for key in rank["injected"]})
        layers = {layer for layer, *_ in rank["injected"]}
        assert len(rank["injected"]) == len(layers) * len(UNEVEN)


@pytest.mark.parametrize(
    ("recompute", "twice"),
    [(FULL, {1, 2, 3, 4}), (RecomputeConfig(granularity="full", method="block", num_layers=2), {1, 2}),
     (RecomputeConfig(granularity="full", num_layers=4), {1, 2, 3, 4}), (RecomputeConfig(granularity="selective"), set())],
    ids=["each", "two", "all at once", "selective"],
)  # fmt: skip
def test_a_recomputed_layer_counts_once(models: Path, recompute: RecomputeConfig, twice: set[int]) -> None:
    """A recomputed layer's tap is called twice a micro-batch, the second time with gradients; rows are counted once and the
    gradient is injected once. Loss and gradient are those without recomputation."""
    distill = DistillConfig(positions="all", final_state="pre_norm")
    (kept,) = run_ranks(1, traced, models, ParallelConfig(), NONE, distill)
    (found,) = run_ranks(1, traced, models, ParallelConfig(), recompute, distill)
    calls = Counter((layer, micro_batch) for layer, micro_batch, *_ in found["calls"])
    assert {layer for (layer, _), count in calls.items() if count == 2} == twice
    assert max(calls.values()) <= 2
    assert len(found["injected"]) == len(set(found["injected"])) == LAYERS * len(UNEVEN)
    assert (
        found["rows"] == kept["rows"] == dict.fromkeys(range(1, LAYERS + 1), sum(len(s.response_ids) for s in UNEVEN))
    )
    assert found["report"].loss == pytest.approx(kept["report"].loss, rel=1e-6)
    assert float(found["norm"]) == pytest.approx(float(kept["norm"]), rel=1e-5)


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(pp=2), ParallelConfig(pp=2, vpp=2), ParallelConfig(pp=2, vpp=2, layers_per_stage=[1, 1, 1, 1])],
    ids=["pp2", "vpp2", "vpp2 even"],
)  # fmt: skip
@pytest.mark.parametrize("final_state", ["post_norm", "pre_norm"])
def test_the_last_layer_is_tapped_on_the_last_chunk(models: Path, parallel: ParallelConfig, final_state: str) -> None:
    """Layer L's state comes from the last stage alone, once a micro-batch, and after or before the final norm as asked: the
    two differ, and each equals the single process's."""
    distill = DistillConfig(positions="all", layers="last", final_state=final_state)  # type: ignore[arg-type]
    (single,) = run_ranks(1, traced, models, ParallelConfig(), NONE, distill)
    first, last = run_ranks(2, traced, models, parallel, NONE, distill)
    assert not first["calls"] and not first["injected"]
    assert Counter(micro_batch for _, micro_batch, *_ in last["calls"]) == Counter(range(len(UNEVEN)))
    assert {layer for layer, *_ in last["calls"]} == {LAYERS}
    assert last["report"].loss == pytest.approx(single["report"].loss, rel=1e-6)
    other = distill.model_copy(update={"final_state": "pre_norm" if final_state == "post_norm" else "post_norm"})
    (different,) = run_ranks(1, traced, models, ParallelConfig(), NONE, other)
    assert abs(different["report"].loss - single["report"].loss) > 1e-3 * single["report"].loss
