"""Output-space terms (OPRD Eq. 2-5): distances between the next-token distributions of student p and teacher q, at the position
that predicts each response token y_t. They add up with the representation loss (Eq. 7)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from oprd_megatron.config.base import Strict
from oprd_megatron.config.schedule import Schedule, is_ever_on


class TermBase(Strict):
    """What every term has."""

    name: str | None = None
    """Name in the metrics; left out, the kind."""
    weight: Schedule = 1.0
    """Factor on the term's mean over its supervised tokens: a number, or [[progress, weight], ..] to move along."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Both models' logits are divided by it. The loss is not multiplied by its square: that is up to `weight`."""
    positions: Literal["all", "last", "last_k", "first_k"] = "all"
    """Supervised response tokens of each rollout: all, the last one, or min(first_or_last, length) at the end or beginning."""
    first_or_last: PositiveInt = 2000
    """k of last_k and first_k."""

    @property
    def label(self) -> str:
        """`name`, resolved."""
        return self.name or str(self.kind)  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _check(self) -> TermBase:
        if not is_ever_on(self.weight):
            raise ValueError(
                f"the term {self.label} can give no gradient: its weight is 0 throughout; leave the term out"
            )
        return self


class SampledTerm(TermBase):
    """One-sample estimate from y_t alone (top-1)."""

    kind: Literal["sampled"]
    """sampled."""
    estimator: Literal["policy_gradient", "k2", "k3"] = "policy_gradient"
    """policy_gradient: (log p - log q), held constant, times the gradient of log p: the reverse KL's gradient, without bias.
    k2: (log p - log q)^2 / 2, whose gradient is the same. k3: q/p - 1 - log(q/p), a low-variance value of reverse KL, but its
    gradient is forward KL's."""


class TopKTerm(TermBase):
    """Reverse KL on a few tokens (Eq. 5)."""

    kind: Literal["topk"]
    """topk."""
    k: PositiveInt = 16
    """Tokens of each model's top set."""
    support: Literal["student", "teacher", "intersection", "union"] = "student"
    """Whose top k are compared."""
    rest: Literal["renormalize", "tail"] = "renormalize"
    """renormalize: both distributions within the set (Eq. 5). tail: everything outside of it is one more outcome."""

    @model_validator(mode="after")
    def _check_k(self) -> TopKTerm:
        if self.k == 1 and self.rest == "renormalize":
            raise ValueError("k: 1 renormalised is identically zero; use kind: sampled, rest: tail, or a larger k")
        return self


class FullTerm(TermBase):
    """Exact over the vocabulary (Eq. 4)."""

    kind: Literal["full"]
    """full."""
    divergence: Literal["reverse", "forward", "jensen_shannon"] = "reverse"
    """reverse: KL(p || q). forward: KL(q || p). jensen_shannon: mixing x KL(p || m) + (1 - mixing) x KL(q || m) with
    m = mixing x p + (1 - mixing) x q."""
    mixing: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """jensen_shannon only: the student's share of the mixture."""


Term = Annotated[SampledTerm | TopKTerm | FullTerm, Field(discriminator="kind")]


class OutputConfig(Strict):
    """Output-space terms, beside the representation loss or instead of it (Eq. 7)."""

    terms: list[Term] = []  # noqa: RUF012 (pydantic copies it)
    """Any number of terms: {kind: sampled | topk | full, weight: .., ..}."""
    teacher_head: Literal["auto", "student", "teacher"] = "auto"
    """Where the teacher's final states meet its LM head. student: on the student's last stage; a state of d_T numbers travels
    for each token. teacher: on the teacher's last stage; only what the terms read travels, which is few numbers for sampled
    and for topk with support: teacher, and is refused for others, which read all of the distribution. auto: the fewer
    bytes."""
    chunk_tokens: PositiveInt = 256
    """Tokens whose logits exist at a time, on a rank."""

    @model_validator(mode="after")
    def _check(self) -> OutputConfig:
        labels = [term.label for term in self.terms]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice:
            raise ValueError(f"terms: two are called {twice}; give them different names")
        if "oprd" in labels:
            raise ValueError("terms: oprd is what the metrics call the representation loss; give the term another name")
        whole = next((term.label for term in self.terms if not reads_few(term)), None)
        if self.teacher_head == "teacher" and whole:
            raise ValueError(
                f"teacher_head: teacher cannot serve the term {whole}, which reads the whole distribution; use auto or student"
            )
        return self


def reads_few(term: SampledTerm | TopKTerm | FullTerm) -> bool:
    """Whether the term needs only a few of the teacher's probabilities, which do not depend on the student."""
    return term.kind == "sampled" or (term.kind == "topk" and term.support == "teacher")
