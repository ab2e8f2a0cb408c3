"""Exact reverse KL: value and gradients of hidden states and head against the formula on whole tensors in float64, on 1, 2
and 4 tensor-parallel ranks, and in mcore's schedule against transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from checkpoints_conversion import mappings_for, read_architecture
from checkpoints_conversion.live.weights import canonical_parameters
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models import Model, build_model
from oprd_megatron.models.schedule import no_output_loss, run_schedule
from oprd_megatron.objectives.final_states import FinalStates
from oprd_megatron.objectives.reverse_kl import reverse_kl_and_gradient, reverse_kl_rows, selected_rows
from oprd_megatron.objectives.vocab_parallel import vocab_parallel_log_softmax
from oprd_megatron.optimizer import _finalize_without_rescaling
from oprd_megatron.parallel import Coords, resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import Platform, select_platform
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import TokenPlacement, arrange
from oprd_megatron.representation.rows import BlockRows, block_rows
from tests.live_bytes import LiveBytes
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

PACK, WIDTHS, WEIGHT = 40, (12, 20), 0.37
RELATIVE = 1e-5
"""Of the largest element: fp32 sums in another order, nothing else."""
BF16 = 2e-2
"""Of the largest element: logits near 10 have steps of 1/16 in bfloat16, and most of that averages out."""


@dataclass(frozen=True)
class Case:
    """One micro-batch: what of it is supervised, and how it lies on the ranks.

    Attributes:
        positions: supervised rows of the pack.
        vocab, padded: ids, and rows of the head over all ranks.
        scale: of the hidden states; at 30 nearly every p and q is one-hot.
        alike: the teacher is the student.
    """

    positions: tuple[int, ...] = (1, 2, 3, 7, 9, 12, 13, 14, 15, 16, 17, 25, 26, 39)
    vocab: int = 50
    padded: int = 64
    chunk_tokens: int = 256
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    alike: bool = False

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden [PACK, 1, D], head [padded, D], teacher states [PACK, D_T], teacher head [padded, D_T]); rows of the heads
        that are padding are huge."""
        draw = torch.Generator().manual_seed(5)
        made = []
        for width in WIDTHS:
            head = torch.randn(self.padded, width, generator=draw)
            head[self.vocab :] = 1e3
            made += [self.scale * torch.randn(PACK, width, generator=draw), head]
        hidden, head, teacher, teacher_head = (tensor.to(self.dtype) for tensor in made)
        return hidden.unsqueeze(1), head, *((hidden, head) if self.alike else (teacher, teacher_head))

    def rows(self, sp: bool, rank: int, tp: int) -> BlockRows:
        """Each rank's own rows, or, where hidden states are replicated, shares of them; last positions first."""
        place, zero = np.array(self.positions, dtype=np.int64), np.zeros(len(self.positions), dtype=np.int64)
        shard, local = np.divmod(place, PACK // tp) if sp else (np.arange(len(place)) % tp, place)
        tokens = TokenPlacement(zero, zero, zero, place, shard, local, replicated=not sp)
        grid = SimpleNamespace(coords=Coords(rank, 0, 0), layout=SimpleNamespace(tp=tp))
        empty = tuple(torch.empty(0, dtype=torch.int64) for _ in range(tp))
        rows = block_rows(tokens, np.arange(len(place))[::-1], grid, torch.device("cpu"))
        return rows.get(0, BlockRows(empty[rank], empty, zero, zero, not sp))


def on_shards(case: Case, sp: bool) -> dict[str, torch.Tensor]:
    """Loss, KL and this rank's gradients, backward starting from 2 as a loss scale would."""
    group = dist.group.WORLD
    rank, tp = group.rank(), group.size()
    hidden, head, teacher, teacher_head = case.tensors()
    local = (hidden.chunk(tp)[rank] if sp else hidden).clone().requires_grad_()
    shard = head.chunk(tp)[rank].clone().requires_grad_()
    block = case.rows(sp, rank, tp)
    rows = selected_rows(local, block, group)
    order = [case.positions[token] for token in block.tokens]
    targets = teacher.flatten(0, -2)[order]
    loss, kl = reverse_kl_rows(
        rows, shard, targets, teacher_head.chunk(tp)[rank], case.vocab, group, WEIGHT, case.chunk_tokens
    )
    (2 * loss).backward()
    return {"loss": loss.detach(), "kl": kl, "hidden": local.grad, "head": shard.grad, "order": torch.tensor(order)}


def reference(case: Case, order: list[int]) -> dict[str, torch.Tensor]:
    """The same on whole tensors in float64, the formula written out; ids from the vocabulary on do not exist."""
    hidden, head, teacher, teacher_head = (tensor.double() for tensor in case.tensors())
    hidden.requires_grad_(), head.requires_grad_()
    log_p = (hidden.flatten(0, 1)[order] @ head[: case.vocab].T).log_softmax(-1)
    log_q = (teacher.flatten(0, -2)[order] @ teacher_head[: case.vocab].T).log_softmax(-1).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = WEIGHT * kl.sum()
    (2 * loss).backward()
    return {"loss": loss.detach(), "kl": kl.detach(), "hidden": hidden.grad, "head": head.grad}


def check(case: Case, tp: int, sp: bool, relative: float = RELATIVE) -> list[dict[str, torch.Tensor]]:
    ranks = run_ranks(tp, on_shards, case, sp)
    expected = reference(case, ranks[0]["order"].tolist())
    hidden = [torch.cat([rank["hidden"] for rank in ranks])] if sp else [rank["hidden"] for rank in ranks]
    found = [("head", torch.cat([rank["head"] for rank in ranks])), *(("hidden", whole) for whole in hidden)]
    found += [(name, rank[name]) for rank in ranks for name in ("loss", "kl")]
    for name, tensor in found:
        assert tensor.shape == expected[name].shape, name
        largest = max([*expected[name].abs().flatten().tolist(), 0.1])  # of a case without rows, too
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=relative * largest)
    return ranks


in_layouts = pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True), (4, False), (4, True)])


@pytest.mark.parametrize("vocab", [64, 50, 17])
@in_layouts
def test_shards_equal_whole_tensors(tp: int, sp: bool, vocab: int) -> None:
    """Loss, KL of each token and every gradient element, whole on each rank where hidden states are replicated; with one
    vocabulary of which whole shards are padding."""
    ranks = check(Case(vocab=vocab), tp, sp)
    assert all(rank["loss"] == ranks[0]["loss"] for rank in ranks)
    assert ranks[0]["loss"].dtype == ranks[0]["kl"].dtype == torch.float32
    assert not torch.cat([rank["head"] for rank in ranks])[vocab:].any()


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 13, 14, 15])
@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_chunks_change_nothing(tp: int, sp: bool, chunk_tokens: int) -> None:
    """14 rows in chunks of one, that leave a rest or none, and around all of them at once."""
    check(Case(chunk_tokens=chunk_tokens), tp, sp)


@pytest.mark.parametrize("positions", [(), (30,), (0, 1), tuple(range(PACK))], ids=len)
@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, False), (2, True), (4, True)])
def test_ranks_without_rows(tp: int, sp: bool, positions: tuple[int, ...]) -> None:
    """No row at all, ranks without rows of their own, and every row of the pack: zeros where nothing is supervised."""
    check(Case(positions=positions), tp, sp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_layouts
def test_a_student_that_is_its_teacher(tp: int, sp: bool, dtype: torch.dtype) -> None:
    """Loss and gradients are exactly 0, not merely small: both sides take the same steps on the same numbers."""
    for rank in run_ranks(tp, on_shards, Case(alike=True, dtype=dtype, chunk_tokens=5), sp):
        assert not any(rank[name].any() for name in ("loss", "kl", "hidden", "head"))


@in_layouts
def test_bf16(tp: int, sp: bool) -> None:
    """Gradients come in the dtype of the tensors and are those of the rounded hidden states and heads."""
    for rank in check(Case(dtype=torch.bfloat16, chunk_tokens=5), tp, sp, BF16):
        assert rank["hidden"].dtype == rank["head"].dtype == torch.bfloat16
        assert rank["kl"].dtype == torch.float32


def test_the_gradient_of_the_head_is_summed_in_fp32() -> None:
    """512 equal chunks give 512 times the gradient of one; in bfloat16 the sum would stand still at 256 times."""
    once, often = (run_ranks(1, on_repeated_row, Case((3,), dtype=torch.bfloat16), count)[0] for count in (1, 512))
    torch.testing.assert_close(often, 512 * once, rtol=0, atol=0)


def on_repeated_row(case: Case, count: int) -> torch.Tensor:
    hidden, head, teacher, teacher_head = case.tensors()
    rows, targets = (states.flatten(0, -2)[list(case.positions) * count] for states in (hidden, teacher))
    reverse_kl_rows(rows, head.requires_grad_(), targets, teacher_head, case.vocab, dist.group.WORLD, WEIGHT, 1)[
        0
    ].backward()
    return head.grad


@pytest.mark.parametrize(("tp", "sp"), [(1, False), (2, True)])
def test_peaked_distributions(tp: int, sp: bool) -> None:
    """Logits of several hundred: probabilities underflow, KL of hundreds of nats, gradients stay finite and right (to 2e-4:
    such logits have errors of 1e-4 in fp32, and so have their exponentials)."""
    check(Case(scale=30.0), tp, sp, 2e-4)


def on_logits() -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    logits, teacher, coefficients = peaked_logits()
    shard, targets = (z.chunk(group.size(), -1)[group.rank()].clone() for z in (logits, teacher))
    kl, gradient = reverse_kl_and_gradient(shard, vocab_parallel_log_softmax(targets, 60, group), 60, group)
    return {"kl": kl, "logits": coefficients.unsqueeze(-1) * gradient}


def peaked_logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student's and teacher's logits [5, 64], 4 ids padding; a coefficient per token): ordinary ones, ids that the student
    excludes with -inf (a whole shard of them too), a lead of 1e4 of either, and ids that both exclude."""
    draw = torch.Generator().manual_seed(9)
    student, teacher = torch.randn(5, 64, generator=draw), torch.randn(5, 64, generator=draw)
    student[1, 3:40] = -torch.inf
    student[2, 7] = teacher[3, 8] = 1e4
    student[4, 20:30] = teacher[4, 20:30] = -torch.inf
    return student, teacher, torch.arange(1.0, 6.0)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_logits_of_minus_infinity(tp: int) -> None:
    """What the student excludes adds nothing, in value and gradient, also where the teacher excludes it too. Errors are
    relative to a token's KL, which its gradient is a difference of."""
    student, teacher, coefficients = peaked_logits()
    log_p, log_q = (logits[:, :60].double().log_softmax(-1) for logits in (student, teacher))
    terms = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    expected = (log_p.exp() * terms).sum(-1)
    exact = log_p.exp() * (terms - expected.unsqueeze(-1)) * coefficients.unsqueeze(-1)
    ranks = run_ranks(tp, on_logits)
    for rank in ranks:
        torch.testing.assert_close(rank["kl"].double(), expected, rtol=RELATIVE, atol=RELATIVE)
    gradient = torch.cat([rank["logits"] for rank in ranks], dim=-1)
    assert not gradient[:, 60:].any()
    assert ((gradient[:, :60] - exact).abs() <= RELATIVE * (1 + expected.unsqueeze(-1))).all()


def test_heads_that_are_padded_differently_are_refused() -> None:
    """Shards of other sizes hold other ids."""
    with pytest.raises(AssertionError, match="padded differently"):
        reverse_kl_rows(torch.ones(1, 2), torch.ones(4, 2), torch.ones(1, 2), torch.ones(6, 2), 4, None, 1.0)


def on_many_rows(num_rows: int, chunk_tokens: int, mode: str) -> int:
    """Peak bytes besides the inputs."""
    width = 256 if mode == "evaluation" else 4  # so that gradients that nobody asked for are large
    rows, head = torch.randn(num_rows, width), torch.randn(4096, width)
    rows.requires_grad_(), head.requires_grad_(mode != "frozen head")
    targets, group, live = (rows.detach(), head.detach()), dist.group.WORLD, LiveBytes()
    with live, torch.set_grad_enabled(mode != "evaluation"):
        loss, kl = reverse_kl_rows(rows, head, *targets, 4000, group, WEIGHT, chunk_tokens)
        gradients = {"training": rows.numel() + head.numel(), "frozen head": rows.numel(), "evaluation": 0}[mode]
        assert live.live <= 4 * (gradients + kl.numel() + loss.numel()), "kept for backward"
        if loss.requires_grad:
            loss.backward()
    return live.peak


@pytest.mark.parametrize("mode", ["training", "frozen head", "evaluation"])
def test_logits_of_one_chunk_at_a_time(mode: str) -> None:
    """The peak is five times a chunk's logits (the teacher's log-probabilities, the student's logits and three temporaries)
    and three times the gradients, for ten chunks as for one."""
    for num_rows in (64, 640):
        most = 4 * (5.1 * 64 * 4096 + (0 if mode == "evaluation" else 3 * 4 * (num_rows + 4096)))
        assert run_ranks(1, on_many_rows, num_rows, 64, mode)[0] <= most


def samples() -> list[Sample]:
    """Ragged; the third micro-batch of two has no response."""
    draw = torch.Generator().manual_seed(3)
    lengths = [(5, 7), (3, 1), (8, 12), (2, 4), (6, 0), (7, 0), (4, 9), (1, 6)]
    ids = [torch.randint(0, 300, (sum(pair),), generator=draw).tolist() for pair in lengths]
    return [Sample(tuple(s[:prompt]), tuple(s[prompt:])) for s, (prompt, _) in zip(ids, lengths, strict=True)]


def placed(hf_dir: Path, parallel: ParallelConfig, platform: Platform, frozen: bool) -> Model:
    architecture = read_architecture(hf_dir)
    layout = resolve_layout(
        parallel, name="parallel", world_size=dist.get_world_size(), num_layers=architecture.num_layers,
        divisible=tp_divisible(architecture, pad_heads=False),
    )  # fmt: skip
    with platform.scope():
        grid = build_grid(layout)
        init_mcore_globals(0, grid.coords.tp)
    return build_model(architecture, grid, platform, dtype=torch.float32, hf_dir=hf_dir, frozen=frozen)


def in_schedule(teacher_dir: Path, student_dir: Path, parallel: ParallelConfig) -> dict:
    """This rank's losses and {canonical name: gradient shard}, with the head trained."""
    platform = select_platform("cpu")
    teacher, student = (placed(path, parallel, platform, path == teacher_dir) for path in (teacher_dir, student_dir))
    sequences = [sample.ids for sample in samples()]
    arrangement = arrange([len(ids) for ids in sequences], student.grid.layout, 2)
    finals = FinalStates(teacher, samples(), arrangement)
    fed = micro_batches(sequences, arrangement, teacher.grid)
    run_schedule(teacher, platform, fed, forward_only=True, on_output=finals.on_output)
    blocks = finals.rows  # the grids are alike, and so are the rows
    sizes = [len(rows.tokens) for rows in blocks.values()]
    targets = dict(zip(blocks, finals.states().split(sizes), strict=True)) if student.grid.is_last_stage else {}
    weight = 3.0 / sum(len(sample.response_ids) for sample in samples())
    losses = []

    def on_output(micro_batch: int, hidden: torch.Tensor) -> torch.Tensor:
        if micro_batch not in blocks:
            return no_output_loss(micro_batch, hidden)
        heads, group = (student.head_weight, teacher.head_weight), student.grid.groups.tp
        rows = selected_rows(hidden, blocks[micro_batch], group)
        loss, _ = reverse_kl_rows(rows, heads[0], targets[micro_batch], heads[1], 300, group, weight, chunk_tokens=5)
        losses.append(loss.item())
        return loss

    student.config.finalize_model_grads_func = _finalize_without_rescaling
    how, groups = DistributedDataParallelConfig(grad_reduce_in_fp32=True), student.grid.groups
    with platform.scope():
        wrapped = [DistributedDataParallel(student.config, how, part, pg_collection=groups) for part in student.chunks]
    fed = micro_batches(sequences, arrangement, student.grid)
    run_schedule(student, platform, fed, forward_only=False, chunks=wrapped, on_output=on_output)
    gradients = {name: p.main_grad.clone() for name, p in canonical_parameters(student.chunks).items()}
    return {"losses": losses, "gradients": gradients, "coords": student.grid.coords, "sharding": student.sharding}


SCHEDULES = {
    "single tied": ParallelConfig(), "tp2": ParallelConfig(tp=2), "tp2sp tied": ParallelConfig(tp=2, sp=True),
    "pp2 tied": ParallelConfig(pp=2), "pp2vpp2": ParallelConfig(pp=2, vpp=2), "dp2": ParallelConfig(dp=2),
    "cp2": ParallelConfig(cp=2), "tp2pp2sp": ParallelConfig(tp=2, pp=2, sp=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_the_schedule(tmp_path: Path, name: str) -> None:
    """The losses add up to 3 times the mean KL of the global batch, and every parameter's gradient, the head's included, is
    that of transformers in one process: nothing is divided by micro-batches, ranks or tokens on the way."""
    paths, parallel = (tmp_path / "teacher", tmp_path / "student"), SCHEDULES[name]
    models = [
        tiny_hf_model("llama", path, vocab_size=300, std=0.1, seed=seed, tied="tied" in name, hidden_size=width)
        for path, seed, width in zip(paths, (1, 2), (48, 32), strict=True)
    ]
    kls = []
    for sample in samples():
        ids, first = torch.tensor([sample.ids]), len(sample.prompt_ids) - 1
        log_q, log_p = (model(ids).logits[0, first:-1].log_softmax(-1) for model in models)
        kls.append((log_p.exp() * (log_p - log_q.detach())).sum(-1))
    loss = 3.0 * torch.cat(kls).mean()
    loss.backward()
    ranks = run_ranks(parallel.tp * parallel.pp * (parallel.dp or 1) * parallel.cp, in_schedule, *paths, parallel)
    assert sum(sum(rank["losses"]) for rank in ranks if rank["coords"].tp == 0) == pytest.approx(loss.item(), rel=1e-5)
    names, checked = dict(models[1].named_parameters()), set()
    for name, mapping in mappings_for(read_architecture(paths[1])).items():
        holders = [r for r in ranks if name in r["gradients"] and (r["coords"].dp, r["coords"].cp) == (0, 0)]
        for stage in sorted({rank["coords"].pp for rank in holders} if mapping.exported else ()):
            shards = [rank["gradients"][name] for rank in holders if rank["coords"].pp == stage]
            for hf_name, gradient in mapping.to_hf(shards, holders[0]["sharding"]).items():
                expected = names[hf_name].grad
                assert (gradient - expected).abs().max() <= RELATIVE * expected.abs().max(), hf_name
                checked.add(hf_name)
    assert checked == set(names)
