"""What is saved of a run, when, and which checkpoints stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from oprd_megatron.config.base import Strict

if TYPE_CHECKING:
    from oprd_megatron.config.schema import RunConfig

EVALUATED = ("kl", "cross_entropy", "student_entropy", "teacher_entropy", "top_overlap", "cosine")
"""Held-out figures."""
NEED_ONE_VOCABULARY = ("kl", "teacher_entropy", "top_overlap")
"""Those that there are not with two tokenizers."""
GRADED = ("accuracy", "best", "majority", "dist_4g", "tokens", "truncated", "no_answer")
"""Figures of each benchmark."""


class BestConfig(Strict):
    """Which checkpoints are the best."""

    measure: Annotated[str, Field(pattern=r"^(eval|benchmark)(/[^/]+)+$")]
    """A figure of the held-out evaluation (eval/kl, eval/cross_entropy, eval/cosine, eval/teachers/NAME/kl) or of the benchmark
    (benchmark/FILE/accuracy). A checkpoint has the figure that was measured at its step, or last before."""
    mode: Literal["min", "max"]
    """Whether small or large is good."""
    count: PositiveInt = 1
    """Keep so many, besides the newest."""


class CheckpointConfig(Strict):
    """Checkpoints lie in <run.dir>/checkpoints in Megatron's layout (iter_0000010/, torch_dist)."""

    every: Annotated[int, Field(ge=0)] = 50
    """Save every so many steps and at the end; 0 saves only at the end."""
    keep: PositiveInt | None = None
    """Keep only the newest so many checkpoints; left out, all."""
    keep_best: BestConfig | None = None
    """Keep the best ones too, where `keep` would drop them; `oprd export RUN OUT --best` takes the best."""
    asynchronous: bool = False
    """Train on while a checkpoint is written (Linux). It counts once every rank has written all: looked after at each step,
    before the next save and at the end. Needs memory for a copy of it meanwhile."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint of the run directory, if there is one. never: refuse to start
    in a directory that holds one."""


def check_best(config: RunConfig) -> None:
    """Refuses a `keep_best` that is never measured while training."""
    best = config.checkpoint.keep_best
    if best is None:
        return
    kind = best.measure.split("/")[0]
    section = config.eval if kind == "eval" else config.benchmark
    if section is None:
        raise ValueError(f"checkpoint.keep_best: {best.measure} is never measured: there is no {kind} section; add one")
    if not section.every:
        raise ValueError(
            f"checkpoint.keep_best: {best.measure} is not measured between the first and the last step ({kind}.every: 0); set "
            f"{kind}.every"
        )
    known = set(_figures(config, kind))
    if best.measure not in known:
        raise ValueError(
            f"checkpoint.keep_best: {best.measure} is not measured in this run; there are {', '.join(sorted(known))}"
        )


def _figures(config: RunConfig, kind: str) -> list[str]:
    """What a run measures while training, by TensorBoard's names."""
    if kind == "benchmark":
        assert config.benchmark is not None
        return [f"benchmark/{path.stem}/{name}" for path in config.benchmark.files for name in GRADED]
    names = [name for name in EVALUATED if not (config.distill.cross_tokenizer and name in NEED_ONE_VOCABULARY)]
    names += [f"terms/{term.label}" for term in config.output.terms if term.kind != "sampled"]
    whose = ["", *(f"teachers/{teacher.name}/" for teacher in config.teachers)]
    return [f"eval/{teacher}{name}" for teacher in whose for name in names]
