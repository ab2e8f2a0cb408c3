"""A plan as plain text of at most 100 columns: grids, layer map, traffic, memory."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from oprd_megatron.parallel.layout import Coords, GridLayout
from oprd_megatron.planning.figures import FollowStudent, ModelPlan, OutputTraffic, RunPlan
from oprd_megatron.planning.step_time import StepTimes

WIDTH = 100
SMALL_WORLD = 16
"""Up to so many ranks every rank is listed."""
ENGINE = "engine: the embedded rollout engine's whole copy of the student, without its cache."
RANKS_SHOWN = 8
"""Ranks of a stage that are named one by one."""


def plan_text(plan: RunPlan, times: StepTimes | None = None) -> str:
    """The whole plan, and about how long a step takes."""
    sections = [_head(plan), _grid("teacher", plan.teacher, plan), _grid("student", plan.student, plan)]
    if plan.world_size <= SMALL_WORLD:
        sections.append(_every_rank(plan))
    sections += [_layer_map(plan), _traffic(plan), _memory(plan)]
    if times is not None:
        sections.append(_times(times))
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in sections)


def _head(plan: RunPlan) -> list[str]:
    batch = plan.batch
    nodes = -(-plan.world_size // plan.gpus_per_node)
    return [
        f"{plan.world_size} {_many('rank', plan.world_size)} on {nodes} {_many('node', nodes)} of {plan.gpus_per_node}; "
        + ("both models on the same ranks" if plan.shares_ranks else "each model on ranks of its own"),
        *_wrap(
            f"Planned for the longest batch that the config allows: {batch.num_samples} rollouts of {batch.prompt_tokens} + "
            f"{batch.response_tokens} tokens, {_looked_at(plan)}."
        ),
    ]


def _looked_at(plan: RunPlan) -> str:
    parts = [f"{plan.batch.num_tokens:,} of them supervised"] if plan.pairs else []
    if plan.batch.predicted_tokens:
        parts.append(f"predictions of {plan.batch.predicted_tokens:,} of them compared")
    return ", ".join(parts)


def _grid(name: str, model: ModelPlan, plan: RunPlan) -> list[str]:
    """Stages down, a stage's first ranks along tp (and cp) across, then what the stage holds."""
    layout, architecture = model.layout, model.architecture
    kind = "frozen" if name == "teacher" else "trained"
    ranks = f"ranks {layout.ranks[0]}-{layout.ranks[-1]}"
    passes = _many("micro-batch", model.num_micro_batches, "es")
    lines = [
        *_wrap(
            f"{architecture.family}, {architecture.num_layers} layers, width {architecture.hidden_size}, {_numbers(model)}, "
            f"{kind}: {model.path}",
            f"{name.upper()}  ",
        ),
        *_wrap(
            f"{layout} on {ranks}; {model.num_micro_batches} {passes} a pipeline pass, the longest pack {model.pack_tokens:,} "
            "tokens",
            "  ",
        ),
    ]
    cells = [_stage_ranks(layout, stage) for stage in range(layout.pp)]
    wide = max(map(len, cells))
    across = "tp" if layout.cp == 1 else "tp | cp"
    title = f"ranks of dp 0 ({across})" if layout.dp > 1 else f"ranks ({across})"
    wide = max(wide, len(title))
    spans = [_span(layout, stage) for stage in range(layout.pp)]
    rest = max(map(len, spans)) if layout.dp > 1 else 0
    holds = "holds" if layout.vpp == 1 else "holds (chunk | chunk)"
    head = f"  stage  {title:<{wide}}" + (f"  {f'x dp {layout.dp}':<{max(rest, 6)}}" if rest else "") + f"  {holds}"
    lines += [head]
    for stage, (cell, span) in enumerate(zip(cells, spans, strict=True)):
        lead = f"  {stage:>5}  {cell:<{wide}}" + (f"  {span:<{max(rest, 6)}}" if rest else "") + "  "
        lines += _wrap(_holds(model, stage), lead, len(lead))
    return lines


def _numbers(model: ModelPlan) -> str:
    """What its parameters are in."""
    kinds = {"dtype": "", "fp8": ", linear layers in fp8", "weight_only": ", weights of linear layers in fp8"}
    return model.dtype + kinds[model.linear]


def _stage_ranks(layout: GridLayout, stage: int) -> str:
    """Ranks of a stage's first data-parallel replica, context-parallel groups apart."""
    digits = len(str(layout.ranks[-1]))
    groups = [
        [f"{layout.rank(Coords(tp, stage, 0, cp)):>{digits}}" for tp in range(layout.tp)] for cp in range(layout.cp)
    ]
    if layout.tp * layout.cp <= RANKS_SHOWN:
        return "[" + " | ".join(" ".join(group) for group in groups) + "]"
    return f"[{groups[0][0]} {(groups[0] + groups[1 % layout.cp])[1]} .. {groups[-1][-1]}]"


def _span(layout: GridLayout, stage: int) -> str:
    first = layout.rank(Coords(0, stage, 0))
    return f"{first}-{first + layout.tp * layout.cp * layout.dp - 1}"


def _holds(model: ModelPlan, stage: int) -> str:
    layout, tied = model.layout, model.architecture.tie_word_embeddings
    parts = [" | ".join(ranges(layout.chunk_layers(stage, chunk)) for chunk in range(layout.vpp))]
    parts[0] = f"{_many('layer', len(layout.layers_of(stage)))} {parts[0]}"
    if stage == 0:
        parts.insert(0, "embedding")
    if stage == layout.pp - 1:
        head = "head" if not tied else "head (the embedding)" if layout.pp == 1 else "head (a copy of the embedding)"
        parts += ["final norm", *([head] if model.has_head else [])]
    return ", ".join(parts)


def _every_rank(plan: RunPlan) -> list[str]:
    """Each rank's coordinates on both grids."""
    lines = ["EVERY RANK", f"  {'rank':>4}  {'node':>4}    {'teacher':<28}{'student':<28}"]
    for rank in range(plan.world_size):
        places = []
        for layout in (plan.teacher.layout, plan.student.layout):
            if rank not in layout.ranks:
                places.append("-")
                continue
            at = layout.coords(rank)
            places.append(f"tp {at.tp}  cp {at.cp}  dp {at.dp}  pp {at.pp}")
        lines.append(f"  {rank:>4}  {rank // plan.gpus_per_node:>4}    {places[0]:<28}{places[1]:<28}")
    return lines


def _layer_map(plan: RunPlan) -> list[str]:
    """Runs of student layers whose teacher layers are on the same stage."""
    if not plan.pairs:
        return ["LAYER MAP  none: distill.mode none compares no states"]
    lines = ["LAYER MAP", f"  {'teacher -> student stage':<26}student layers <- teacher layers"]
    teacher, student = plan.teacher.layout, plan.student.layout
    stages = lambda p: (teacher.stage_of(p.teacher_layer), student.stage_of(p.student_layer))  # noqa: E731
    for (a, b), group in groupby(plan.pairs, stages):
        pairs = list(group)
        learners, teachers = (
            ranges(layers) for layers in ([p.student_layer for p in pairs], [p.teacher_layer for p in pairs])
        )
        lead = f"  {a:>7} -> {b:<15}"
        lines += _wrap(f"{learners} <- {teachers}", lead, len(lead))
    return lines


def _traffic(plan: RunPlan) -> list[str]:
    traffic, batch = plan.traffic, plan.batch
    format_ = f"({traffic.wire}, {traffic.width} wide: {traffic.state_bytes} bytes a state)" if plan.pairs else ""
    lines = [
        f"TRAFFIC A STEP  {format_}",
        f"  {'teacher -> student stage':<26}{'layers':>7}{'states':>16}{'sent':>12}{'stays':>8}",
    ]
    for row in traffic.stages:
        lines.append(
            f"  {row.teacher_stage:>7} -> {row.student_stage:<15}{len(row.layers):>7}{row.states:>16,}"
            f"{size(row.moved_bytes):>12}{row.stays:>8.1%}"
        )
    whole = traffic.same_rank_bytes + traffic.total_bytes
    count = f"{sum(row.states for row in traffic.stages):,}"
    if out := traffic.outputs:
        count = ""
        lines.append(
            f"  {out.teacher_stage:>7} -> {out.student_stage:<15}{'outputs':>7}{out.tokens:>16,}"
            f"{size(out.moved_bytes):>12}{out.stays:>8.1%}"
        )
    stays = traffic.same_rank_bytes / whole
    lines.append(f"  {'all':<26}{'':>7}{count:>16}{size(traffic.total_bytes):>12}{stays:>8.1%}")
    for what, number in (
        ("stays on its rank", traffic.same_rank_bytes),
        ("within a node", traffic.same_node_bytes),
        ("between nodes", traffic.between_nodes_bytes),
    ):
        lines.append(f"  {what:<26}{'':>7}{'':>16}{size(number):>12}{number / whole:>8.1%}")
    if out:
        lines += _wrap(_outputs(out), "  ")
    budget = "no spool_bytes" if batch.spool_bytes is None else f"spool_bytes {size(batch.spool_bytes)}"
    lines.append(
        f"  {traffic.num_messages:,} messages, {batch.num_chunks} {_many('chunk', batch.num_chunks)} ({budget})"
    )
    if traffic.links and traffic.most_sent and traffic.most_received:
        source, destination, most = traffic.links[0]
        lines += _wrap(
            f"busiest link {source} -> {destination}: {size(most)}; most sent by rank {traffic.most_sent[0]}: "
            f"{size(traffic.most_sent[1])}; most received by rank {traffic.most_received[0]}: {size(traffic.most_received[1])}",
            "  ",
        )
    return lines + ([] if plan.follow is None else _follow(plan.follow))


def _outputs(out: OutputTraffic) -> str:
    what, where = "the final states", "the student's last stage applies the teacher's head"
    if out.head == "teacher":
        what, where = "what the terms read", "the teacher's last stage applies its head"
    wire = f"({out.wire}, {out.width} wide: {out.token_bytes} bytes a token)"
    return f"outputs: {what} of {out.tokens:,} tokens {wire}; {where}"


def _follow(follow: FollowStudent) -> list[str]:
    saving = f"{follow.saving:.0%} less"
    if follow.is_configured:
        text = (
            f"layers_per_stage: follow_student sends {saving} than even stages "
            f"({size(follow.moved_bytes)}, not {size(follow.other_bytes)}); layers {list(follow.stages)}"
        )
        return _wrap(text, "  ")
    if follow.saving < 0.005:
        return []
    text = (
        f"teacher.parallel.layers_per_stage: follow_student would send {saving} ({size(follow.moved_bytes)}, not "
        f"{size(follow.other_bytes)}); layers {list(follow.stages)}"
    )
    return _wrap(text, "  ")


def _memory(plan: RunPlan) -> list[str]:
    """By stage for each model, then by rank."""
    lines = ["MEMORY OF A RANK  (weights, gradients, optimizer and spool exact, activations estimated)"]
    for name, model in (("teacher", plan.teacher), ("student", plan.student)):
        columns = ("parameters", "weights", "gradients", "optimizer", "activations", "sum")
        lines.append(f"  {name + ' stage':<16}" + "".join(f"{column:>13}" for column in columns))
        rows = [(m.weights, m.gradients, m.optimizer, m.activations, m.total) for m in model.memory]
        for stage, (m, row) in enumerate(zip(model.memory, rows, strict=True)):
            lines.append(f"  {stage:>13}   {m.parameters / 1e6:>11,.1f} M" + "".join(f"{_size(n):>13}" for n in row))
    lines.append("")
    place = "host spool" if plan.batch.spool == "host" else "spool"
    outputs = plan.traffic.outputs is not None
    has_vllm = any(rank.vllm for rank in plan.ranks)
    names = (
        "teacher",
        "student",
        "activations",
        place,
        *["outputs"] * outputs,
        "vLLM" if has_vllm else "engine",
        "in all",
    )
    wide = [12 if column == "activations" else 11 for column in names]
    lines.append(f"  {'ranks':<14}{'stages':<6}" + "".join(f"{c:>{w}}" for c, w in zip(names, wide, strict=True)))
    for rank in plan.ranks:
        stages = f"{_stage(rank.teacher_stage)}, {_stage(rank.student_stage)}"
        ranks = f"{rank.first_rank}.. ({rank.num_ranks})" if rank.num_ranks > 1 else str(rank.first_rank)
        figures = (
            rank.teacher, rank.student, rank.activations, rank.spool, *[rank.outputs] * outputs,
            rank.vllm if has_vllm else rank.engine, rank.device_bytes,
        )  # fmt: skip
        lines.append(
            f"  {ranks:<14}{stages:<6}" + "".join(f"{_size(n):>{w}}" for n, w in zip(figures, wide, strict=True))
        )
    lines += _wrap(
        "Stages are the teacher's and the student's. The models take turns, so the larger activations count. "
        + (_vllm(plan) if has_vllm else ENGINE)
        + " Not in it: CUDA and NCCL (a few GiB), workspaces.",
        "  ",
    )
    if outputs:
        lines += _wrap(
            "outputs (estimated): the teacher's head on the student's last stage where it is not the teacher's own, the "
            "logits of output.chunk_tokens tokens, and the gradient of the student's head.",
            "  ",
        )
    if plan.held_out_engine_bytes:
        lines += _wrap(
            f"With an eval section every engine on the teacher's ranks holds {size(plan.held_out_engine_bytes)} more once, "
            "before the first step, to answer the held-out prompts.",
            "  ",
        )
    return lines


def _vllm(plan: RunPlan) -> str:
    asleep = max(rank.vllm_on_host for rank in plan.ranks)
    return (
        "vLLM: its share of the GPU (gpu_memory_utilization), in turn with activations, spool and outputs, so the larger of "
        f"both counts; asleep it leaves {size(asleep)} of weights in host memory."
    )


def _times(times: StepTimes) -> list[str]:
    """A row for each batch, a column for each phase."""
    phases = ("rollout", "teacher", "exchange", "student", "update", "sync")
    lines = [
        "TIME OF A STEP, ESTIMATED  (seconds, from assumed rates of H100s, or those of --cluster)",
        f"  {'responses':<24}{'tokens':>11}" + "".join(f"{phase:>9}" for phase in (*phases, "step")),
    ]
    for time in (times.typical, times.longest):
        length = f"median {time.median_tokens:,} tokens" if time.median_tokens else "all as long as allowed"
        seconds = [getattr(time, phase) for phase in phases]
        row = "".join(f"{number:>9.1f}" for number in (*seconds, time.whole))
        lines.append(f"  {length:<24}{time.tokens:>11,}{row}")
    rates = times.cluster
    engines = f"{times.engines} rollout {_many('engine', times.engines)} on {times.engine_gpus} "
    engines += f"{_many('GPU', times.engine_gpus)} each, {times.engine_slots} sequences at a time"
    text = (
        f"{engines if times.engines else 'text is recorded'}; {rates.teacher_flops / 1e12:.0f} TFLOP/s (fp8 "
        f"{rates.teacher_fp8_flops / 1e12:.0f}) in the teacher, {rates.student_flops / 1e12:.0f} in the student, "
        f"{rates.link_bytes_per_second / 1e9:.0f} GB/s between machines. Not in it: attention's FLOPs, stragglers, evaluation, "
        "checkpoints."
    )
    if times.learners_overlap:
        text += " Teacher and student work at the same time, chunk by chunk: the slower one counts."
    return lines + _wrap(text, "  ")


def size(number: int) -> str:
    """Bytes for people: 1.5 GiB."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 999.95 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def ranges(numbers: Sequence[int]) -> str:
    """1-4, 7, 9-10."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _size(number: int) -> str:
    return size(number) if number else "-"


def _stage(stage: int | None) -> str:
    return "-" if stage is None else str(stage)


def _many(word: str, number: int, ending: str = "s") -> str:
    return word if number == 1 else word + ending


def _wrap(text: str, lead: str = "", indent: int = 2) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * indent, break_on_hyphens=False)
