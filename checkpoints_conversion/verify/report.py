"""Everything that a comparison found, the verdict, and both as text."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from checkpoints_conversion.verify.architectures import FieldDifference
from checkpoints_conversion.verify.states import LogitsDifference, StateDifference
from checkpoints_conversion.verify.tensors import TensorComparison, TensorDifference

FP32_TOLERANCE = 1e-4
"""Of a token's state, relative. transformers and mcore multiply and add in another order: measured on a CPU, 0 to 5e-6 on
tiny models of every family, 0 on SmolLM2-135M. There, a rope base that is 1 % off makes 4e-4 after the first layer and 2e-2
later, an epsilon of 1e-6 for 1e-5 makes 9e-4 and 5e-2."""
BF16_TOLERANCE = 0.1
"""The same in bf16, to say where to look once the verdict is that they differ. It is no verdict: bf16 rounds by 0.002 at every
operation, and a token that goes to another expert has a state that is 0.4 off (measured)."""
BF16_MAX_KL = 0.02
"""Nats a token, mean. It makes the verdict of bf16, with the next; measured at most 0.002 and at least 0.94. Small mistakes in
the settings are below it: fp32 finds them."""
BF16_MIN_TOP1 = 0.9
SHOWN_TENSORS = 8
SHOWN_FIELD = 60
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SideSummary:
    """One of the models, in words."""

    path: str
    format: str
    family: str
    num_layers: int
    num_tensors: int
    dtypes: tuple[str, ...]


@dataclass
class Report:
    """What was found.

    Attributes:
        a, b: the models.
        num_layers: of A.
        architecture: fields that differ.
        problems: of a checkpoint's own settings, a line each.
        notes: what could not be compared.
        tokenizers: what of them was compared.
        tokenizer_differences: a line each.
        tensors: see `TensorComparison`.
        compute_dtype: of the states.
        tolerance: what the user allowed; None for the defaults.
        prompts: what was read, in one line; None if nothing was computed.
        not_computed: why nothing was, or None.
        states: by unit: embedding, layers from 1 on, final norm.
        logits: as states, and as distributions.
        seconds, peak_bytes: what it took.
    """

    a: SideSummary
    b: SideSummary
    num_layers: int
    architecture: list[FieldDifference]
    problems: list[str]
    notes: list[str]
    tokenizers: str
    tokenizer_differences: list[str]
    tensors: TensorComparison
    compute_dtype: Literal["fp32", "bf16"]
    tolerance: float | None
    prompts: str | None = None
    not_computed: str | None = None
    states: list[StateDifference] = field(default_factory=list)
    logits: LogitsDifference | None = None
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def state_tolerance(self) -> float:
        if self.compute_dtype == "bf16":
            return BF16_TOLERANCE
        return FP32_TOLERANCE if self.tolerance is None else self.tolerance

    @property
    def differing_tensors(self) -> list[TensorDifference]:
        """Those that count: with a tolerance of the user's, values within it do not."""
        allowed = self.tolerance or 0.0
        return [tensor for tensor in self.tensors.differences if tensor.what != "values" or tensor.relative > allowed]

    @property
    def first_differing_unit(self) -> int | None:
        """The first whose states differ by more than the tolerance."""
        beyond = (unit for unit, state in enumerate(self.states) if not state.relative <= self.state_tolerance)
        return next(beyond, None)

    @property
    def meaning_differs(self) -> bool:
        """Whether states or logits are beyond what is allowed."""
        if self.logits is None:
            return False
        if self.compute_dtype == "fp32":
            return self.first_differing_unit is not None
        allowed = BF16_MAX_KL if self.tolerance is None else self.tolerance
        return not (self.logits.kl <= allowed and self.logits.top1_agreement >= BF16_MIN_TOP1)

    @property
    def reasons(self) -> list[str]:
        """Why the models are not the same, most telling first; none if they are."""
        found = [where_it_begins(self)] if self.meaning_differs else []
        found += [f"{tensor.name} {_in_words(tensor)}" for tensor in self.differing_tensors[:1]]
        found += [f"{each.name} is {_short(each.a)} in A and {_short(each.b)} in B" for each in self.settings]
        return found + self.problems + [f"tokenizer: {line}" for line in self.tokenizer_differences[:1]]

    @property
    def settings(self) -> list[FieldDifference]:
        """Fields of the configs that differ and change the maths."""
        return [each for each in self.architecture if each.changes_maths]

    @property
    def is_equal(self) -> bool:
        return not self.reasons

    def as_json(self) -> dict[str, Any]:
        """Plain values; infinities as text."""
        found: dict[str, Any] = _plain(dataclasses.asdict(self))
        del found["tensors"]["compute_dtypes"]
        return {"equal": self.is_equal, "reasons": self.reasons, **found}


def unit_name(unit: int, num_layers: int) -> str:
    """A unit as a reader knows it: layers count from 1."""
    names = {0: "embedding", num_layers + 1: "final norm", num_layers + 2: "logits"}
    return names.get(unit, f"layer {unit}")


def where_it_begins(report: Report) -> str:
    """The first unit whose states differ, and why: its tensors, those before it, or the settings."""
    unit = report.first_differing_unit
    if unit is None:
        return "the logits differ by more than bf16's rounding explains, though no single layer does"
    name = unit_name(unit, report.num_layers)
    if 1 <= unit <= report.num_layers:
        name = f"{name} of {report.num_layers} (model.layers.{unit - 1})"
    begins = f"{name} is the first whose states differ (relative {report.states[unit].relative:.1e}): "
    units = [(unit_of(tensor.name, report), tensor) for tensor in report.differing_tensors]
    own = [tensor.name for place, tensor in units if place == unit]
    if own:
        return f"{begins}of its tensors {', '.join(own[:3])} {'differs' if len(own) == 1 else 'differ'}"
    before = [tensor.name for place, tensor in units if place < unit]
    if before:
        return f"{begins}no tensor of it differs, but before it {', '.join(before[:3])} does"
    guilty = ", ".join(each.name for each in report.settings) or "rope base? norm epsilon? config.json tells"
    return f"{begins}no tensor up to it differs; the settings do ({guilty})"


def unit_of(name: str, report: Report) -> int:
    """The unit that a tensor belongs to."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer[1]) + 1
    return {"model.embed_tokens.weight": 0, "model.norm.weight": report.num_layers + 1}.get(name, report.num_layers + 2)


def report_text(report: Report) -> str:
    """All of it, the verdict last but one."""
    lines = []
    for label, side in (("A", report.a), ("B", report.b)):
        lines.append(
            f"{label}  {side.path}: {side.format}, {side.family}, {side.num_layers} layers, "
            f"{side.num_tensors} tensors, {' and '.join(side.dtypes)}"
        )
    lines += ["", f"architecture  {_architecture_line(report)}"]
    lines += [
        f"  {each.name}: {_short(each.a)} | {_short(each.b)}" + ("" if each.changes_maths else " (changes no result)")
        for each in report.architecture
    ]
    lines += [f"  {line}" for line in report.problems]
    lines.append(f"tokenizers    {'differ' if report.tokenizer_differences else 'equal'}, {report.tokenizers}")
    lines += [f"  {line}" for line in report.tokenizer_differences]
    lines += _tensor_lines(report)
    lines += _state_lines(report)
    lines += [f"note: {note}" for note in report.notes]
    lines += ["", *_verdict_lines(report)]
    lines.append(f"{report.seconds:.1f} s, peak memory {report.peak_bytes / 2**20:.0f} MiB")
    return "\n".join(lines)


def _architecture_line(report: Report) -> str:
    count = len(report.settings)
    return (
        "equal" if not count else f"{count} field{'s' * (count > 1)} that change{'s' * (count == 1)} the maths differ"
    )


def _tensor_lines(report: Report) -> list[str]:
    found = report.tensors
    parts = [f"{found.num_bitwise} of {found.num_tensors} equal to the bit"]
    if found.num_rounded:
        pairs = ", ".join(f"{a} | {b}" for a, b in sorted(found.rounding)) or "zeros of another sign"
        parts.append(f"{found.num_rounded} equal once rounded to the coarser dtype ({pairs})")
    lines = [f"tensors       {', '.join(parts)}"]
    worst = sorted(found.differences, key=lambda each: (each.what == "values", -each.relative))
    lines += [f"  {each.name} {_in_words(each)}" for each in worst[:SHOWN_TENSORS]]
    if len(worst) > SHOWN_TENSORS:
        lines.append(f"  and {len(worst) - SHOWN_TENSORS} more")
    return lines


def _in_words(tensor: TensorDifference) -> str:
    if tensor.what == "shape":
        return f"has shapes {tensor.detail}"
    if tensor.what != "values":
        return f"is {tensor.what}"
    return (
        f"differs in {tensor.num_differing} of {tensor.num_values} values: max abs {tensor.max_abs:.1e}, "
        f"relative {tensor.relative:.1e}"
    )


def _state_lines(report: Report) -> list[str]:
    if report.logits is None:
        return [f"states        not computed: {report.not_computed}"]
    rounded = ", with weights rounded to the coarser dtype" if report.tensors.rounding else ""
    lines = [f"states        {report.compute_dtype}{rounded}, {report.prompts}", ""]
    lines.append(f"  {'':10}  {'max abs':>9}  {'relative':>9}  {'cosine':>10}")
    for unit, state in enumerate(report.states):
        is_first = report.meaning_differs and unit == report.first_differing_unit
        mark = "  <- first beyond the tolerance" if is_first else ""
        name = unit_name(unit, report.num_layers)
        lines.append(f"  {name:10}  {state.max_abs:9.1e}  {state.relative:9.1e}  {state.cosine:10.7f}{mark}")
    logits = report.logits
    lines.append("")
    lines.append(
        f"  next token: same top-1 at {logits.num_same_top} of {logits.num_tokens}, KL(A || B) {logits.kl:.1e} nats/token, "
        f"at most {logits.max_kl:.1e}"
    )
    return lines


def _verdict_lines(report: Report) -> list[str]:
    if not report.is_equal:
        return ["DIFFERENT", *(f"  - {reason}" for reason in report.reasons)]
    if report.logits is None:
        return ["EQUAL, as far as tensors and configs tell; states were not computed"]
    allowed = (
        f"every state within {report.state_tolerance:g} of its size"
        if report.compute_dtype == "fp32"
        else f"KL at most {report.tolerance or BF16_MAX_KL:g}, top-1 agreement at least {BF16_MIN_TOP1:g}"
    )
    return [f"EQUAL: {allowed}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_FIELD else text[: SHOWN_FIELD - 3] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
