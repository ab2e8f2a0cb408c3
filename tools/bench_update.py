#!/usr/bin/env python
"""What an actor update costs, in time and memory: OPRD against OPD on the same fixed rollouts, written well and as usual.

    python tools/bench_update.py                     1.5B-shaped slice and small sweeps on this machine, minutes
    python tools/bench_update.py --shape paper       the paper's shape, for a GPU: 28 layers, 8 x 16,384 tokens, bf16, AdamW
    python tools/bench_update.py --rollouts r.jsonl  lengths and ids that `oprd rollout` recorded

Arms, on the same random models, the same packed micro-batches through the same mcore schedule, one forward of each model:

    oprd       ours: Eq. 6 on every layer at the last k response positions, injected where the layer lives; no LM head runs
    opd-*      ours: sampled, top-16 (student's support, renormalised) or full reverse KL; logits of a few tokens at a time
    dense-*    the same losses as commonly written: logits [tokens, V] of both models for a micro-batch, log_softmax in fp32,
               autograd
    release    OPRD as the authors' code does it: full-length states of every layer cast to fp32 and stacked, for both models,
               before the last k positions are selected; both LM heads run over the whole sequence, their logits are dropped

The update is everything after the teacher's forward: student forward, loss, backward (for opd-* also what it needs of the
teacher's head, which the dense arms run in the teacher's forward). Memory is the most that is held at a time in the update,
ABOVE what is resident: both models' weights, gradient buffers, and the optimizer's state where there is one. What the teacher's
forward left for the update counts. The optimizer's step is the same for all arms and timed apart. An untied head has a
gradient buffer in every arm, though a run of OPRD alone would freeze it and have none.

On CPU every allocation and release of torch's allocator is read from its profiler: in forward, in backward and inside kernels.
Beside it stands the rise of the process's peak resident set; glibc is told to give back blocks above 1 MiB at once, else freed
activations would count. On a GPU it is the allocator's own peak.

On CPU, seconds are those that this process computed, so that others on the machine do not count; the clock's stand beside them.

Arms take turns, round after round; times are medians, ratios are of the same round, with their smallest and largest. One
process for each case. That arms agree which compute the same thing (opd-x and dense-x, oprd and release: loss and gradient
norm) is checked on the way.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from oprd_megatron.entry import EXIT_USER_ERROR, one_line_errors, quiet_libraries
from oprd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from oprd_megatron.models import MicroBatch, Model
    from oprd_megatron.optimizer import StudentOptimizer
    from oprd_megatron.platform import Platform
    from oprd_megatron.representation.batch import Sample

Phase = Callable[[str], contextlib.AbstractContextManager[None]]
GIB, MIB = 2**30, 2**20
TERMS = ("topk", "sampled", "full")
TOP_K = 16
M_MMAP_THRESHOLD = -3
"""glibc's name (malloc.h) for the size from which blocks are mapped, and so given back, one by one."""
AGREE = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of losses and gradient norms of arms that compute the same thing."""


@dataclass(frozen=True)
class Case:
    """Shape of both models and of the batch.

    Attributes:
        varies: what this case is a point of: headline, length, width, vocabulary or terms.
        response, prompt: tokens of each of `responses` random rollouts, if there are no recorded ones in `rollouts`.
        k: OPRD supervises the last k response positions.
        terms: of the opd and dense arms.
    """

    varies: str = "headline"
    layers: int = 2
    width: int = 1536
    vocab: int = 151_936
    response: int = 2048
    prompt: int = 64
    responses: int = 1
    k: int = 2000
    tied: bool = True
    dtype: Literal["fp32", "bf16"] = "fp32"
    optimizer: bool = False
    terms: tuple[str, ...] = ("topk",)
    rounds: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollouts: Path | None = None

    @property
    def arms(self) -> list[str]:
        """In the order in which they take turns."""
        return ["oprd", *(f"opd-{t}" for t in self.terms), *(f"dense-{t}" for t in self.terms), "release"]

    @property
    def parameters(self) -> int:
        """Of one model, without norms and biases."""
        layer = self.width**2 * 2 + 2 * self.width * self.kv_width + 3 * self.width * self.ffn
        return self.layers * layer + self.vocab * self.width * (1 if self.tied else 2)

    @property
    def heads(self) -> int:
        return self.width // 128 if self.width >= 256 else 4

    @property
    def kv_width(self) -> int:
        return 2 * self.width // self.heads

    @property
    def ffn(self) -> int:
        """Of Qwen2-1.5B, in proportion: 8960 for 1536."""
        return 35 * self.width // 6

    def needed_bytes(self) -> int:
        """Rough upper estimate of what the case takes: resident, activations, and dense logits in fp32 six times."""
        size = 4 if self.dtype == "fp32" else 2
        resident = self.parameters * (2 * size + 4 + (12 if self.optimizer else 0))
        tokens = self.prompt + self.response
        return resident + tokens * (self.layers * 32 * self.width * size + 6 * 4 * self.vocab)

    def __str__(self) -> str:
        text = "recorded" if self.rollouts else f"{self.responses} x {self.response:,}"
        tied = "tied" if self.tied else "untied"
        return f"d {self.width}, V {self.vocab:,}, {self.layers} layers, {text} tokens, {self.dtype}, {tied}"


SHAPES = {
    "slice": Case(),
    "paper": Case(layers=28, response=16_384, prompt=256, responses=8, tied=False, dtype="bf16", optimizer=True),
    "tiny": Case(layers=2, width=32, vocab=300, response=48, prompt=8, responses=2, k=20, terms=TERMS),
}
SMALL = {"layers": 3, "width": 512, "vocab": 32_768, "response": 512}
"""What the slice's sweeps vary around."""


def sweep(shape: str, headline: Case) -> list[Case]:
    """Cases that vary length, width and vocabulary one at a time around a middle one, which has all three terms."""
    if shape == "tiny":
        return []
    if shape == "paper":
        middle = replace(headline, response=4096, responses=2)
        lengths, widths, vocabs = (2048, 8192), (768, 1024), (32_768, 65_536)
    else:
        middle = replace(headline, **SMALL)  # type: ignore[arg-type]
        lengths, widths, vocabs = (256, 1024), (256, 1024), (8_192, 131_072)
    return [
        replace(middle, varies="terms", terms=TERMS),
        *(replace(middle, varies="length", response=length) for length in lengths),
        *(replace(middle, varies="width", width=width) for width in widths),
        *(replace(middle, varies="vocabulary", vocab=vocab) for vocab in vocabs),
    ]


# --- measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Seconds and peak bytes of each phase of one arm's step, above what was live when the meter was opened.

    Attributes:
        seconds, cpu_seconds: {phase: ..}, of the clock and of this process's threads; the latter only where it computes.
        peak, rss: {phase: ..}; rss, the rise of the process's peak resident set, only on Linux CPUs.
        left: bytes still alive when it was closed.
    """

    platform: Platform
    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    rss: dict[str, int] = field(default_factory=dict)
    left: int = 0

    def __enter__(self) -> Meter:
        import torch

        gc.collect()
        self.platform.synchronize()
        self.stack = contextlib.ExitStack()
        if self.platform.is_cuda:
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()
            return self
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.before = _proc_status("VmRSS")
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile = self.stack.enter_context(profiler)
        return self

    def __exit__(self, *error: object) -> None:
        import torch

        self.stack.close()
        if self.platform.is_cuda:
            self.left = torch.cuda.memory_allocated() - self.before
        else:
            self._read_profile()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        import torch

        name = "teacher" if name == "teacher" else "update"  # the exchange is part of the update
        self._forget_peak()
        with torch.profiler.record_function(f"phase {name}"):
            start, cpu_start = time.perf_counter(), time.process_time()
            yield
            self.platform.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + time.process_time() - cpu_start
        if self.platform.is_cuda:
            self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated() - self.before)
        elif sys.platform == "linux":
            self.rss[name] = max(self.rss.get(name, 0), _proc_status("VmHWM") - self.before)

    def _forget_peak(self) -> None:
        import torch

        if self.platform.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def _read_profile(self) -> None:
        """Add up the allocator's events; a phase is the span of its `record_function`."""
        events = sorted(self.profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
        spans = [
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name().removeprefix("phase "))
            for event in events
            if event.name().startswith("phase ")
        ]
        live, seen = 0, 0
        for event in events:
            if event.name() != "[memory]":
                continue
            now, held = event.start_ns(), live  # what was live until now counts for every span that began since
            live += event.nbytes()
            while seen < len(spans) and spans[seen][1] < now:
                self.peak[spans[seen][2]] = max(self.peak.get(spans[seen][2], 0), held)
                seen += 1
            if seen < len(spans) and spans[seen][0] <= now:
                self.peak[spans[seen][2]] = max(self.peak.get(spans[seen][2], 0), held, live)
        self.left = live


def _proc_status(name: str) -> int:
    """A size of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


# --- the arms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Both models on one rank, and the batch."""

    case: Case
    teacher: Model
    student: Model
    optimizer: StudentOptimizer
    platform: Platform

    def run(self, arm: str, samples: list[Sample], phase: Phase) -> float:
        """One step of an arm into the student's gradient buffers. Returns the loss."""
        how, _, term = arm.partition("-")
        if term:
            return (self._opd if how == "opd" else self._dense)(samples, phase, term)
        return (self._oprd if how == "oprd" else self._release)(samples, phase)

    def _oprd(self, samples: list[Sample], phase: Phase) -> float:
        from oprd_megatron.representation.alignment import Alignment
        from oprd_megatron.representation.flow import Passes

        alignment = Alignment(self.teacher, self.student, self._positions(), self.platform, micro_batch_size=1)
        passes = Passes(train=True, chunks=self.optimizer.chunks, phase=phase)
        return alignment.reduce(alignment.run(alignment.plan(samples), passes)).loss

    def _opd(self, samples: list[Sample], phase: Phase, term: str) -> float:
        """As the trainer does it (trainer.py, `forward_backward`)."""
        from oprd_megatron.config.output import OutputConfig
        from oprd_megatron.config.schema import DistillConfig
        from oprd_megatron.objectives.output_loss import OutputLoss
        from oprd_megatron.representation.alignment import Alignment
        from oprd_megatron.representation.flow import Passes

        config = OutputConfig.model_validate({"terms": [{"kind": term, **({"k": TOP_K} if term == "topk" else {})}]})
        output = OutputLoss(self.teacher, self.student, config, self.platform.device)
        alignment = Alignment(
            self.teacher, self.student, DistillConfig(mode="none"), self.platform, 1, signal=output.signal
        )
        plan = alignment.plan(samples)
        batch = output.of_batch(plan, output.weights(0.0))
        alignment.run(plan, Passes(True, self.optimizer.chunks, batch.on_outputs, phase))
        return sum(batch.means().values())

    def _dense(self, samples: list[Sample], phase: Phase, term: str) -> float:
        """Whole logits of both models for a micro-batch at a time."""
        losses, weight = [], 1 / sum(len(sample.response_ids) for sample in samples)
        loss_of = {"topk": dense_topk, "sampled": dense_sampled, "full": dense_full}[term]
        kept: dict[int, torch.Tensor] = {}

        def keep(micro_batch: int, logits: torch.Tensor) -> torch.Tensor:
            kept[micro_batch] = logits
            return logits.new_zeros(())

        def on_output(micro_batch: int, logits: torch.Tensor) -> torch.Tensor:
            sample, device = samples[micro_batch], logits.device
            first = len(sample.prompt_ids) - 1
            rows = slice(first, first + len(sample.response_ids))  # the states that predict the response
            student, teacher = (x[0, rows, : self.case.vocab] for x in (logits, kept.pop(micro_batch)))
            values, surrogate = loss_of(student, teacher, _as_tensor(sample.response_ids, device))
            losses.append(weight * values)
            return weight * surrogate

        self._by_micro_batch(samples, phase, keep, on_output)
        return sum(map(float, losses))

    def _release(self, samples: list[Sample], phase: Phase) -> float:
        """Full-length fp32 stacks of every layer of both models, then the selection; logits are computed for nothing."""
        import torch

        config, losses, targets = self._positions(), [], {}
        weight = 1 / sum(len(sample.positions(config)[1]) for sample in samples)
        tapped: dict[int, torch.Tensor] = {}

        def tap(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
            tapped[layer] = hidden

        def stack() -> torch.Tensor:
            """[layers, P, D] fp32, connected to the states if gradients are on."""
            states = torch.stack([tapped[layer].flatten(0, 1).float() for layer in sorted(tapped)])
            tapped.clear()
            return states

        def keep(micro_batch: int, logits: torch.Tensor) -> torch.Tensor:
            targets[micro_batch] = stack()
            return logits.new_zeros(())

        def on_output(micro_batch: int, logits: torch.Tensor) -> torch.Tensor:
            rows = samples[micro_batch].positions(config)[1]
            student, teacher = stack(), targets.pop(micro_batch)
            selected = [states[:, rows[0] : rows[-1] + 1] for states in (student, teacher)]
            loss = weight * (selected[0] - selected[1]).square().mean(-1).mean(0).sum()
            losses.append(loss.detach())
            return loss

        self._by_micro_batch(samples, phase, keep, on_output, tap)
        return sum(map(float, losses))

    def _by_micro_batch(
        self,
        samples: list[Sample],
        phase: Phase,
        on_teacher: Callable[[int, torch.Tensor], torch.Tensor],
        on_student: Callable[[int, torch.Tensor], torch.Tensor],
        tap: Callable[[int, int, torch.Tensor], None] | None = None,
    ) -> None:
        """Teacher, then student, with their heads, one micro-batch (one rollout) after the other, so that no more than one's is
        held of the teacher."""
        from oprd_megatron.models import run_schedule
        from oprd_megatron.representation.taps import attached_taps

        layers = range(1, self.case.layers + 1) if tap else range(0)
        tap = tap or (lambda layer, micro_batch, hidden: None)
        for batch in self._micro_batches(samples):
            with phase("teacher"), attached_taps(self.teacher, layers, "post_norm", tap):
                run_schedule(self.teacher, self.platform, [batch], forward_only=True, head=True, on_output=on_teacher)
            with phase("student"), attached_taps(self.student, layers, "post_norm", tap):
                run_schedule(
                    self.student, self.platform, [batch], forward_only=False, chunks=self.optimizer.chunks, head=True,
                    on_output=on_student, finalize=batch.number + 1 == len(samples),
                )  # fmt: skip

    def _micro_batches(self, samples: list[Sample]) -> list[MicroBatch]:
        from oprd_megatron.representation.feed import micro_batches
        from oprd_megatron.representation.placement import arrange

        ids = [sample.ids for sample in samples]
        return micro_batches(ids, arrange([len(of) for of in ids], self.student.grid.layout, 1), self.student.grid)

    def _positions(self) -> Any:
        from oprd_megatron.config.schema import DistillConfig

        return DistillConfig(positions="last_k", k=self.case.k)

    def grad_norm(self) -> float:
        """Of the gradient buffers as they are."""
        parameters = [parameter for chunk in self.optimizer.chunks for parameter in chunk.parameters()]
        return math.sqrt(sum(float(parameter.main_grad.norm()) ** 2 for parameter in parameters))  # type: ignore[attr-defined]

    def resident_bytes(self) -> int:
        """Weights, gradient buffers and optimizer state, each storage once."""
        chunks = [*self.teacher.chunks, *self.student.chunks]
        tensors: list[Any] = [parameter for chunk in chunks for parameter in chunk.parameters()]
        tensors += [getattr(tensor, "main_grad", None) for tensor in tensors]
        for optimizer in getattr(self.optimizer.optimizer, "chained_optimizers", [self.optimizer.optimizer]):
            tensors += [value for state in optimizer.optimizer.state.values() for value in state.values()]
            tensors += [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        storages = [tensor.untyped_storage() for tensor in tensors if hasattr(tensor, "untyped_storage")]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _as_tensor(ids: Any, device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(ids, device=device)


def dense_topk(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 5 on logits [N, V]: reverse KL, renormalised on the student's top 16. Returns (sum over tokens, the same to be
    differentiated)."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    top = log_p.topk(TOP_K).indices
    log_p, log_q = (log.gather(-1, top).log_softmax(-1) for log in (log_p, log_q))
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), loss


def dense_sampled(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The one-sample estimate of reverse KL as a policy gradient: its value is log p - log q at y_t, its gradient that value,
    held constant, times the gradient of log p."""
    log_p, log_q = (x.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) for x in (student, teacher))
    advantage = (log_p - log_q).detach()
    return advantage.sum(), (advantage * log_p).sum()


def dense_full(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4: reverse KL over the vocabulary."""
    log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum()
    return loss.detach(), loss


# --- one case ------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, case: Case) -> None:
    """Random weights in Hugging Face form, of the case's shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = Qwen2Config(
        num_hidden_layers=case.layers, hidden_size=case.width, intermediate_size=case.ffn, num_attention_heads=case.heads,
        num_key_value_heads=2, vocab_size=case.vocab, tie_word_embeddings=case.tied, max_position_embeddings=131_072,
        initializer_range=case.width**-0.5, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    (model if case.dtype == "fp32" else model.bfloat16()).save_pretrained(folder)


def open_bench(case: Case, folder: Path) -> Bench:
    """Both models from the same files, on a world of one rank. The teacher's weights are then moved by a tenth."""
    import torch

    from checkpoints_conversion import read_architecture
    from oprd_megatron.config.schema import OptimizerConfig, ParallelConfig
    from oprd_megatron.models import DTYPES, build_model
    from oprd_megatron.optimizer import build_optimizer
    from oprd_megatron.parallel import resolve_layout
    from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
    from oprd_megatron.platform import init_distributed, select_platform

    platform, architecture = select_platform(case.device), read_architecture(folder)
    init_distributed(platform)
    models = []
    for name, frozen in (("teacher", True), ("student", False)):
        layout = resolve_layout(ParallelConfig(), name=name, world_size=1, num_layers=case.layers, divisible={})
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, 0)
        models.append(build_model(architecture, grid, platform, dtype=DTYPES[case.dtype], hf_dir=folder, frozen=frozen))
    teacher, student = models
    torch.manual_seed(1)
    for parameter in teacher.chunks[0].parameters():
        parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    # a learning rate that moves nothing: every arm meets the same weights
    still = OptimizerConfig(lr=1e-20, weight_decay=0.0)
    return Bench(case, teacher, student, build_optimizer(student, still, 10**6, platform, trains_head=True), platform)


def make_samples(case: Case) -> list[Sample]:
    """Random rollouts, or the first `responses` recorded ones, cut to `response` tokens."""
    import torch

    from oprd_megatron.representation.batch import Sample

    if case.rollouts is None:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(case.vocab, (case.responses, case.prompt + case.response), generator=generator).tolist()
        return [Sample(tuple(of[: case.prompt]), tuple(of[case.prompt :])) for of in ids]
    lines = read_rollouts(case.rollouts, case.vocab)[: case.responses]
    return [Sample(tuple(prompt), tuple(response[: case.response])) for prompt, response in lines]


def read_rollouts(path: Path, vocab: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) ids of a file of `oprd rollout`.

    Raises:
        UserError: no such file, or a line that is not a rollout of a model with this vocabulary.
    """
    if not path.is_file():
        raise UserError(f"--rollouts: there is no file {path}; `oprd rollout CONFIG --out FILE` writes one")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            prompt, response = record["prompt_ids"], record["response_ids"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--rollouts: {path}, line {number}: not json with prompt_ids and response_ids, as `oprd rollout` writes"
            ) from None
        if not prompt or not response:
            raise UserError(f"--rollouts: {path}, line {number}: prompt or response is empty; leave the line out")
        if max(*prompt, *response) >= vocab:
            raise UserError(f"--rollouts: {path}, line {number}: a token id is not below --vocab {vocab}; raise it")
        found.append((prompt, response))
    if not found:
        raise UserError(f"--rollouts: {path} is empty")
    return found


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """All arms of a case, in turn, in this process."""
    import torch
    from tqdm import tqdm

    bench, samples = open_bench(case, folder), make_samples(case)
    short = [replace(of, prompt_ids=of.prompt_ids[:8], response_ids=of.response_ids[:24]) for of in samples[:1]]
    for arm in case.arms:  # warm up, and make the optimizer's state
        bench.optimizer.zero_grad()
        bench.run(arm, short, lambda name: contextlib.nullcontext())
    if case.optimizer:
        bench.optimizer.step()
    found: dict[str, Any] = {arm: {"rounds": []} for arm in case.arms}
    with tqdm(total=case.rounds * len(case.arms), desc=str(case), unit="step", leave=False) as bar:
        for _ in range(case.rounds):
            for arm in case.arms:
                bar.set_postfix_str(arm)
                if "failed" not in found[arm]:
                    try:
                        found[arm]["rounds"].append(step(bench, arm, samples))
                    except torch.OutOfMemoryError:
                        found[arm] = {"rounds": [], "failed": "out of memory"}
                bar.update()
    threads, device = torch.get_num_threads(), bench.platform.device
    name = torch.cuda.get_device_name() if bench.platform.is_cuda else "cpu"
    return {
        "name": str(case),
        "case": {**asdict(case), "rollouts": str(case.rollouts) if case.rollouts else None},
        "tokens": [len(sample.response_ids) for sample in samples],
        "machine": {"device": device.type, "name": name, "threads": threads, "cores": os.cpu_count(),
                    "load": os.getloadavg()[0], "torch": torch.__version__},
        "resident_bytes": bench.resident_bytes(),
        "arms": {arm: summary(values) for arm, values in found.items()},
    }  # fmt: skip


def step(bench: Bench, arm: str, samples: list[Sample]) -> dict[str, float]:
    """One measured step of one arm."""
    bench.optimizer.zero_grad()
    with Meter(bench.platform) as meter:
        loss = bench.run(arm, samples, meter.phase)
    norm, optimizer_seconds = bench.grad_norm(), 0.0
    if bench.case.optimizer:
        start = time.perf_counter()
        bench.optimizer.step()
        bench.platform.synchronize()
        optimizer_seconds = time.perf_counter() - start
    return {
        "loss": loss,
        "grad_norm": norm,
        "update_seconds": meter.seconds["update"],
        "teacher_seconds": meter.seconds["teacher"],
        "optimizer_seconds": optimizer_seconds,
        "peak_bytes": meter.peak["update"],
        "teacher_peak_bytes": meter.peak["teacher"],
        "left_bytes": meter.left,
        **({"peak_rss_bytes": meter.rss["update"]} if meter.rss else {}),
        **({} if bench.platform.is_cuda else {f"{of}_cpu_seconds": s for of, s in meter.cpu_seconds.items()}),
    }


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds, beside the rounds."""
    if "failed" in values:
        return values
    rounds = values["rounds"]
    return {**{key: statistics.median(of[key] for of in rounds) for key in rounds[0]}, "rounds": rounds}


def case_main(case: Case, folder: Path, out: Path) -> None:
    """A case in a process of its own."""
    os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler's own chatter
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    quiet_libraries()
    with one_line_errors():
        write_model(folder, case)
        out.write_text(json.dumps(measure(case, folder)))


# --- the report ----------------------------------------------------------------------------------------------------------


def ratios(result: dict[str, Any], arm: str, other: str, key: Callable[[dict[str, float]], float]) -> list[float]:
    """(median, smallest, largest) of an arm's value over another's in the same round; empty if one did not fit."""
    pairs = zip(result["arms"][arm]["rounds"], result["arms"][other]["rounds"], strict=False)
    values = [key(mine) / key(theirs) for mine, theirs in pairs]
    return [statistics.median(values), min(values), max(values)] if values else []


def update_time(of: dict[str, float]) -> float:
    return of.get("update_cpu_seconds", of["update_seconds"])


def teacher_time(of: dict[str, float]) -> float:
    return of.get("teacher_cpu_seconds", of["teacher_seconds"])


def whole_time(of: dict[str, float]) -> float:
    return teacher_time(of) + update_time(of)


def peak(of: dict[str, float]) -> float:
    return of["peak_bytes"]


@dataclass(frozen=True)
class Bar:
    """What the headline case is judged by."""

    text: str
    arm: str
    other: str
    at_most: float
    keys: tuple[Callable[[dict[str, float]], float], ...]


BARS = [
    Bar("peak of oprd, of release's", "oprd", "release", 0.5, (peak,)),
    Bar("peak of oprd, of our top-16's", "oprd", "opd-topk", 0.9, (peak,)),
    Bar("time of oprd, of our top-16's (update; with the teacher's forward)", "oprd", "opd-topk", 0.95,
        (update_time, whole_time)),
    Bar("peak of our top-16, of dense top-16's", "opd-topk", "dense-topk", 0.5, (peak,)),
]  # fmt: skip


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars on one case; one that is not measured is left out."""
    judged = []
    for bar in BARS:
        if bar.arm in result["arms"] and bar.other in result["arms"]:
            found = [ratios(result, bar.arm, bar.other, key) for key in bar.keys]
            if all(found):
                passed = all(median <= bar.at_most for median, *_ in found)
                judged.append({"bar": bar.text, "at_most": bar.at_most, "ratios": found, "passed": passed})
    return judged


def disagreements(result: dict[str, Any]) -> list[str]:
    """Arms that should compute the same thing and do not."""
    arms, bound, told = result["arms"], AGREE[result["case"]["dtype"]], []
    for arm, other in [("oprd", "release"), *((f"opd-{term}", f"dense-{term}") for term in TERMS)]:
        if not arms.get(arm, {}).get("rounds") or not arms.get(other, {}).get("rounds"):
            continue
        for key in ("loss", "grad_norm"):
            mine, theirs = arms[arm][key], arms[other][key]
            if abs(mine - theirs) > bound * max(abs(mine), abs(theirs), 0.1):  # the sampled loss is a mean about 0
                told.append(f"{arm} and {other} differ in {key}: {mine:.6g}, {theirs:.6g}")
    return told


def table(results: list[dict[str, Any]]) -> str:
    """All cases and arms, as markdown."""
    lines = [
        "| case | arm | peak above resident, MiB | peak resident set, MiB | peak / oprd | teacher forward, s | update, s | "
        "update on the clock, s | time / oprd (teacher + update) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = result["name"]
        for arm, of in result["arms"].items():
            if "failed" in of:
                lines.append(f"| {case} | {arm} | {of['failed']} | | | | | | |")
                continue
            rss = f"{of['peak_rss_bytes'] / MIB:,.1f}" if "peak_rss_bytes" in of else "-"
            size = next(iter(ratios(result, arm, "oprd", peak)), math.nan)
            spread = "[{1:.2f}-{2:.2f}]".format(*times) if (times := ratios(result, arm, "oprd", whole_time)) else ""
            lines.append(
                f"| {case} | {arm} | {of['peak_bytes'] / MIB:,.1f} | {rss} | {size:.2f} | {teacher_time(of):.2f} | "
                f"{update_time(of):.2f} | {of['update_seconds']:.2f} | {times[0] if times else math.nan:.2f} {spread} |"
            )
    return "\n".join(lines)


def notes(results: list[dict[str, Any]]) -> str:
    """Bars, agreement of arms and of the two ways to count memory, as markdown."""
    lines = []
    for judged in judge(results[0]):
        figures = "; ".join("{:.3f} [{:.3f}-{:.3f}]".format(*of) for of in judged["ratios"])
        lines.append(
            f"- {'pass' if judged['passed'] else 'MISS'}: {judged['bar']}: {figures}, at most {judged['at_most']}"
        )
    lines += [f"- WRONG: {text}" for result in results for text in disagreements(result)]
    arms = [of for result in results for of in result["arms"].values() if of.get("peak_rss_bytes")]
    if arms:
        over = [of["peak_rss_bytes"] / of["peak_bytes"] for of in arms]
        lines.append(
            f"- the process's peak resident set rises by {min(over):.2f}-{max(over):.2f} of the allocator's count (median "
            f"{statistics.median(over):.2f})"
        )
    machine = results[0]["machine"]
    lines.append(
        f"- {machine['name']}, {machine['threads']} threads on {machine['cores']} cores, load "
        f"{min(r['machine']['load'] for r in results):.1f}-{max(r['machine']['load'] for r in results):.1f}, torch "
        f"{machine['torch']}; resident in the first case: {results[0]['resident_bytes'] / GIB:.2f} GiB"
    )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Memory above, time below: the first case as bars, then against length, width and vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {"length": "response", "width": "width", "vocabulary": "vocab"}
    middle = [result for result in results if result["case"]["varies"] == "terms"]
    groups = {name: [r for r in results if r["case"]["varies"] == name] + middle for name in columns}
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    figure, axes = plt.subplots(2, 1 + len(groups), figsize=(4.2 * (1 + len(groups)), 7), squeeze=False)
    rows: list[tuple[str, Callable[[dict[str, float]], float]]] = [
        ("peak above resident, GiB", lambda of: of["peak_bytes"] / GIB),
        ("teacher forward + update, s", whole_time),
    ]
    colors = {arm: f"C{index}" for index, arm in enumerate(["oprd", "opd-topk", "dense-topk", "release"])}
    for row, (label, key) in enumerate(rows):
        first = {arm: key(of) for arm, of in results[0]["arms"].items() if of["rounds"]}
        axes[row, 0].bar(list(first), list(first.values()), color=[colors.get(arm, "0.6") for arm in first])
        plt.setp(axes[row, 0].get_xticklabels(), rotation=45, ha="right")
        axes[row, 0].set_ylabel(label)
        for column, (name, group) in enumerate(groups.items(), 1):
            group.sort(key=lambda result: result["case"][columns[name]])
            for arm, color in colors.items():
                points = [(r["case"][columns[name]], key(r["arms"][arm])) for r in group if r["arms"][arm]["rounds"]]
                axes[row, column].plot(*zip(*points, strict=True), "o-", color=color, label=arm)
            axes[row, column].set_xscale("log", base=2)
            axes[row, column].set_xlabel({"length": "response tokens"}.get(name, name))
            axes[row, column].set_ylim(bottom=0)
    axes[0, 0].set_title(results[0]["name"].replace(" layers, ", " layers,\n"), fontsize=9)
    if groups:
        axes[0, 1].legend(fontsize=8)
        axes[0, 1].set_title("around " + middle[0]["name"].replace(" layers, ", " layers,\n"), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# --- the command ---------------------------------------------------------------------------------------------------------


def refuse(case: Case) -> None:
    """Raises UserError for a case that cannot work here."""
    import psutil
    import torch

    if case.width % (128 if case.width >= 256 else 8):
        raise UserError(f"--width {case.width}: give a multiple of 128 (below 256, of 8)")
    if case.vocab < TOP_K:
        raise UserError(f"--vocab {case.vocab}: top-{TOP_K} needs at least {TOP_K} tokens")
    unknown = set(case.terms) - set(TERMS)
    if unknown or not case.terms:
        raise UserError(f"--terms: {', '.join(sorted(unknown)) or 'none'}; choose of {', '.join(TERMS)}")
    if case.rollouts is not None:
        read_rollouts(case.rollouts, case.vocab)
    available = psutil.virtual_memory().available
    on_cpu = case.device == "cpu" or (case.device == "auto" and not torch.cuda.is_available())
    if on_cpu and case.needed_bytes() > available:
        raise UserError(
            f"{case}: needs about {case.needed_bytes() / GIB:.0f} GiB and {available / GIB:.0f} are free; lower "
            "--response-tokens, --vocab or --layers"
        )


def run_cases(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case in a process of its own, one after the other."""
    context, results = multiprocessing.get_context("spawn"), []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="bench_update_") as name:
            folder = Path(name)
            process = context.Process(target=case_main, args=(case, folder / "model", folder / "result"))
            process.start()
            process.join()
            if process.exitcode == EXIT_USER_ERROR:
                raise typer.Exit(EXIT_USER_ERROR)  # it has said why
            if process.exitcode:
                why = "it was killed, which usually means memory" if process.exitcode < 0 else "its output is above"
                raise UserError(f"{case}: failed, {why}; try lower --response-tokens, --vocab or --layers")
            results.append(json.loads((folder / "result").read_text()))
    return results


def main(
    shape: Annotated[
        str,
        typer.Option(
            help="slice: two layers of Qwen2-1.5B (d 1536, V 151,936) on 2,048 tokens, then sweeps around a smaller model. "
            "paper: all 28 layers, 8 x 16,384 tokens, bf16, with AdamW's state, for a GPU; what does not fit is left out. "
            "tiny: seconds, to see it work."
        ),
    ] = "slice",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of both models.")] = None,
    width: Annotated[int | None, typer.Option(min=32, help="Hidden size; heads and FFN follow in proportion.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary size.")] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a response.")] = None,
    responses: Annotated[
        int | None, typer.Option(min=1, help="Responses in the batch; one is one micro-batch.")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="OPRD supervises the last k response tokens; 2000.")
    ] = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Head and embedding share their weight.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16, of both models.")] = None,
    optimizer: Annotated[
        bool | None,
        typer.Option(
            "--optimizer/--no-optimizer", help="AdamW's state in the resident baseline, its step timed apart."
        ),
    ] = None,
    terms: Annotated[str | None, typer.Option(help="Of opd and dense, with commas: topk,sampled,full.")] = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="jsonl of `oprd rollout`, cut to --responses and --response-tokens; no sweeps then."),
    ] = None,
    sweeps: Annotated[
        bool, typer.Option("--sweeps/--no-sweeps", help="Also vary length, width and vocabulary.")
    ] = True,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns that every arm gets.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Directory for update.json, update.md and update.png.")] = Path(
        "runs/bench_update"
    ),
) -> None:
    """Time and peak memory of the actor update: OPRD and OPD as built here, OPD with dense logits, OPRD as released.

    The same fixed rollouts, the same models, one forward of each. Memory is what the update holds above weights, gradient
    buffers and optimizer state. The first case is judged by bars that are printed with pass or MISS. Example:

    python tools/bench_update.py --shape slice --response-tokens 1024 --no-sweeps --terms topk,full
    """
    with one_line_errors():
        choices = {"shape": (shape, tuple(SHAPES)), "dtype": (dtype or "fp32", ("fp32", "bf16"))}
        choices["device"] = (device, ("auto", "cpu", "cuda"))
        for option, (value, allowed) in choices.items():
            if value not in allowed:
                raise UserError(f"--{option} {value}: choose of {', '.join(allowed)}")
        given = {
            "layers": layers, "width": width, "vocab": vocab, "response": response_tokens, "responses": responses, "k": k,
            "tied": tied, "dtype": dtype, "optimizer": optimizer, "rollouts": rollouts, "rounds": rounds, "device": device,
            "terms": tuple(terms.split(",")) if terms is not None else None,
        }  # fmt: skip
        headline = replace(SHAPES[shape], **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        cases = [headline, *(sweep(shape, headline) if sweeps and rollouts is None else [])]
        for case in cases:
            refuse(case)
        out.mkdir(parents=True, exist_ok=True)
        results = run_cases(cases)
    report = {"cases": results, "bars": judge(results[0])}
    (out / "update.json").write_text(json.dumps(report, indent=1))
    text = f"{table(results)}\n\n{notes(results)}\n"
    (out / "update.md").write_text(text)
    plot(results, out / "update.png")
    typer.echo(text + f"\nwritten: {out}/update.json, update.md, update.png")


if __name__ == "__main__":
    typer.run(main)
