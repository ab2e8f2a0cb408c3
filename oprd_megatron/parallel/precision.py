"""From a model's `precision` to what runs: the policy (what works where), mcore's settings, and which layers stay in dtype.

    linear       recipe       needs                                      widths on a rank     a scale for
    fp8          tensorwise   TE, compute capability 9.0                 multiples of 16      a tensor, by its largest value
    fp8          blockwise    TE, 9.0                                    multiples of 128     128 values, 128 x 128 weights
    fp8          delayed      TE, 9.0, trained, equal grids, pp 1        multiples of 16      a tensor, by earlier steps
    fp8          mxfp8        TE, 10.0                                   multiples of 32      32 values
    weight_only  -            nothing                                    multiples of 32      32 weights of a row

mcore computes in bf16 without a word where Transformer Engine (TE) is missing, so that is refused here. Which ranks agree on
the scales of `delayed` mcore takes from its global state, which does not know that two models share this process: without
groups there TE uses the whole world, so every rank has to make the same passes. The other recipes' scales are found by the
ranks that hold the tensor, over the model's own tensor-parallel group, and are safe on any grid. Attention stays in bf16, so
what context parallelism lacks there is what it lacks without fp8.

No process groups, no GPU and no mcore here: the machine is an argument.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from checkpoints_conversion.architecture import Architecture, Sharding
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import ConfigError, LayoutError
from oprd_megatron.parallel.layout import GridLayout

WEIGHT_BLOCK = 32
"""Weights of a row that share a scale where weights alone are quantised."""
MULTIPLES = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What each recipe's matrices have to be multiples of."""
LEAST_CAPABILITY = {"tensorwise": (9, 0), "delayed": (9, 0), "blockwise": (9, 0), "mxfp8": (10, 0)}


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    Attributes:
        capability: compute capability of the GPU; None without one.
        has_te: Transformer Engine is installed.
    """

    capability: tuple[int, int] | None
    has_te: bool


def check_precisions(
    config: RunConfig,
    architectures: tuple[Architecture, Architecture],
    layouts: tuple[GridLayout, GridLayout],
    machine: Machine | None,
) -> None:
    """`check_precision` of both models of a run; the pairs are (teacher's, student's)."""
    check_precision("teacher", config.teacher.precision, architectures[0], layouts[0], layouts[1], machine)
    check_precision("student", config.student.precision, architectures[1], layouts[1], layouts[0], machine)


def check_precision(
    name: str,
    precision: PrecisionConfig,
    architecture: Architecture,
    layout: GridLayout,
    other: GridLayout,
    machine: Machine | None,
) -> None:
    """Refuse what would not run, or would run as something else.

    Args:
        name: of the model's section: teacher or student.
        precision: of the model.
        architecture: of the model.
        layout: of the model.
        other: the other model's layout.
        machine: that will run it; None where that is not known (`oprd plan`).

    Raises:
        ConfigError, LayoutError: one line: what, where, what to do.
    """
    if not precision.is_quantised:
        return
    where = f"{name}.precision"
    if precision.linear == "fp8" and machine is not None:
        _check_machine(where, precision, machine)
    unknown = max(precision.keep_layers, default=0)
    if unknown > architecture.num_layers:
        raise ConfigError(f"{where}.keep_layers: {unknown} of {architecture.num_layers} layers; layers count from 1")
    if len(kept_layers(precision, architecture.num_layers)) == architecture.num_layers:
        raise ConfigError(f"{where}: every layer stays in dtype; keep fewer, or set linear: dtype")
    if precision.linear == "fp8":
        _check_ends(where, precision, layout)
    if precision.recipe == "delayed" and (layout.pp > 1 or _shape(layout) != _shape(other)):
        raise LayoutError(
            f"{where}.recipe: delayed lets all ranks agree on scales in every pass, but this model ({layout}) and the other "
            f"({other}) do not make the same passes; use equal grids without pp, or recipe: tensorwise"
        )
    multiple = MULTIPLES[precision.recipe] if precision.linear == "fp8" else WEIGHT_BLOCK
    for what, width in widths_on_a_rank(architecture, layout.tp).items():
        if width % multiple:
            kind = f"recipe: {precision.recipe}" if precision.linear == "fp8" else "linear: weight_only"
            advice = "lower tp" if layout.tp > 1 else "use linear: dtype"
            if precision.linear == "fp8" and multiple != 16 and width % 16 == 0:
                advice = "use recipe: tensorwise"
            raise LayoutError(f"{where}: {what} is {width}, but {kind} needs multiples of {multiple}; {advice}")


def _check_machine(where: str, precision: PrecisionConfig, machine: Machine) -> None:
    instead = " or linear: dtype" if where.startswith("student") else " or linear: weight_only"
    if machine.capability is None:
        raise ConfigError(f"{where}.linear: fp8 needs a GPU, and there is none; use one{instead}")
    least = LEAST_CAPABILITY[precision.recipe]
    if machine.capability < least:
        found, wanted = (".".join(map(str, value)) for value in (machine.capability, least))
        raise ConfigError(
            f"{where}.recipe: {precision.recipe} needs a GPU of compute capability {wanted}, and this one has {found}; use "
            f"{'recipe: tensorwise' if machine.capability >= (9, 0) else 'another GPU' + instead}"
        )
    if not machine.has_te:
        raise ConfigError(f"{where}.linear: fp8 needs Transformer Engine, which is not installed; install it{instead}")


def _check_ends(where: str, precision: PrecisionConfig, layout: GridLayout) -> None:
    """mcore keeps at most as many layers at an end as an even stage has."""
    most = layout.num_layers // layout.pp
    for key in ("first_layers", "last_layers"):
        if getattr(precision, key) > most:
            raise ConfigError(
                f"{where}.{key}: {getattr(precision, key)} is more than a stage's {most} layers; use keep_layers for the others"
            )


def _shape(layout: GridLayout) -> tuple[int, ...]:
    return layout.tp, layout.cp, layout.dp, layout.pp, layout.first_rank


def widths_on_a_rank(architecture: Architecture, tp: int) -> dict[str, int]:
    """Rows and columns that a rank's matrices have, by what they are called."""
    groups = Sharding.smallest(architecture, 0, tp).num_query_groups_padded // tp
    experts = architecture.experts
    features = experts.ffn_hidden_size if experts else architecture.ffn_hidden_size
    heads = groups * architecture.heads_per_group
    share = " / tp" if tp > 1 else ""
    return {
        "hidden_size": architecture.hidden_size,
        f"attention heads x head_dim{share}": heads * architecture.head_dim,
        f"(heads and twice the key/value heads) x head_dim{share}": (heads + 2 * groups) * architecture.head_dim,
        f"ffn_hidden_size{share}": features // tp,
    }


def kept_layers(precision: PrecisionConfig, num_layers: int) -> frozenset[int]:
    """Layers (1-based) whose linear layers stay in dtype.

    Raises:
        ConfigError: the file that `noise` names cannot be read, or is about other layers.
    """
    if not precision.is_quantised:
        return frozenset(range(1, num_layers + 1))
    ends = {*range(1, precision.first_layers + 1), *range(num_layers - precision.last_layers + 1, num_layers + 1)}
    return frozenset({*ends, *precision.keep_layers, *_worst(precision, num_layers)} & set(range(1, num_layers + 1)))


def _worst(precision: PrecisionConfig, num_layers: int) -> list[int]:
    if not precision.keep_worst or precision.noise_file is None:
        return []
    worst = read_noise(precision)["worst"]
    if max(worst) > num_layers:
        raise ConfigError(
            f"precision.noise: {precision.noise_file}: was measured on a model of more than {num_layers} layers; measure again"
        )
    return list(worst[: precision.keep_worst])


def read_noise(precision: PrecisionConfig) -> dict[str, Any]:
    """What the doctor wrote.

    Raises:
        ConfigError: there is no such file, or it is another.
    """
    assert precision.noise_file is not None
    found: Any = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(precision.noise_file.read_text())
    if not isinstance(found, dict) or not {"worst", "layers"} <= found.keys():
        raise ConfigError(
            f"precision.noise: {precision.noise_file}: cannot be read; write it with `oprd doctor --precision --out PATH`"
        )
    return found


def mcore_settings(precision: PrecisionConfig, frozen: bool) -> dict[str, Any]:
    """What mcore's configuration says about fp8; nothing unless TE computes in it. A frozen model has no gradients, a
    student's are in e5m2."""
    if precision.linear != "fp8":
        return {}
    in_fp8 = frozen if precision.fp8_parameters is None else precision.fp8_parameters
    return dict(
        fp8="e4m3" if frozen else "hybrid",
        fp8_recipe=precision.recipe,
        fp8_param=in_fp8,
        first_last_layers_bf16=bool(precision.first_layers or precision.last_layers),
        num_layers_at_start_in_bf16=precision.first_layers,
        num_layers_at_end_in_bf16=precision.last_layers,
    )


def weight_bytes(name: str, precision: PrecisionConfig, kept: frozenset[int], itemsize: int, frozen: bool) -> float:
    """Bytes of one number of a parameter, scales included (a tensor's own four bytes are left out).

    Args:
        name: Megatron's, with a 0-based layer.
        precision: of the model.
        kept: layers that stay in dtype.
        itemsize: of dtype.
        frozen: the model is not trained.
    """
    parts = name.split(".")
    is_linear = len(parts) > 3 and parts[-2].startswith("linear_") and parts[-1] == "weight"
    if not precision.is_quantised or not is_linear or int(parts[2]) + 1 in kept:
        return itemsize
    if precision.linear == "weight_only":
        return 1 + 1 / WEIGHT_BLOCK
    if not mcore_settings(precision, frozen)["fp8_param"]:
        return itemsize
    return 1 + {"blockwise": 4 / 128**2, "mxfp8": 1 / 32}.get(precision.recipe, 0.0)
