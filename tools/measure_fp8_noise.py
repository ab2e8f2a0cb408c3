"""What fp8 does to a teacher's states: several ways of rounding, emulated on any device, against the same model in dtype.

    python tools/measure_fp8_noise.py examples/quickstart.yaml --out fp8_noise teacher.parallel.pp=1 student.parallel.pp=1

Ways: weights alone, or weights and the inputs of linear layers (what Transformer Engine multiplies), with a scale for each
tensor, row (token) or block (128 x 128 weights, 128 inputs), or as the project stores weights (powers of two for 32 of a row).
The products themselves stay exact. Writes <out>.json and <out>.png, and prints a line for each way. One rank.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.nn.functional import pad

from oprd_megatron.config import load_config
from oprd_megatron.evaluation.plots import BLUE, GRAY, GREEN, ORANGE
from oprd_megatron.models import Model
from oprd_megatron.models.weight_only import FP8, dequantise, quantise
from oprd_megatron.noise.compare import Noise, compare
from oprd_megatron.noise.gate import LIMIT, share_of_noise
from oprd_megatron.noise.measure import in_dtype, prompt_samples
from oprd_megatron.parallel.precision import WEIGHT_BLOCK
from oprd_megatron.placing import build_models
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import filled_up

Round = Callable[[torch.Tensor], torch.Tensor]
LARGEST, BLOCK = 448.0, 128


def rounded(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """To e4m3 and back, where `largest` (which broadcasts) becomes 448."""
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (values / scale).to(FP8).float() * scale


def by_tensor(values: torch.Tensor) -> torch.Tensor:
    """One scale."""
    return rounded(values, values.abs().amax())


def by_row(values: torch.Tensor) -> torch.Tensor:
    """One scale for each row: output feature, or token."""
    return rounded(values, values.abs().amax(-1, keepdim=True))


def by_tile(values: torch.Tensor) -> torch.Tensor:
    """One scale for each 128 x 128 weights."""
    rows, columns = values.shape
    whole = pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return rounded(whole, whole.abs().amax((1, 3), keepdim=True)).flatten(2).flatten(0, 1)[:rows, :columns]


def by_part(values: torch.Tensor) -> torch.Tensor:
    """One scale for each 128 inputs of a token."""
    columns = values.size(-1)
    whole = pad(values, (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    return rounded(whole, whole.abs().amax(-1, keepdim=True)).flatten(-2)[..., :columns]


def by_32_bf16(values: torch.Tensor) -> torch.Tensor:
    """A bf16 scale, rounded up, for each 32 of a row."""
    parts = values.unflatten(-1, (-1, WEIGHT_BLOCK))
    scale = (parts.abs().amax(-1, keepdim=True) / LARGEST * (1 + 2**-8)).bfloat16().float()
    return rounded(parts, scale * LARGEST).flatten(-2)


def by_32(values: torch.Tensor) -> torch.Tensor:
    """A power of two for each 32 of a row."""
    return dequantise(*quantise(values), torch.float32)


WAYS: dict[str, tuple[Round, Round | None]] = {
    "weights, tensor": (by_tensor, None),
    "weights, row": (by_row, None),
    "weights, block 128 x 128": (by_tile, None),
    "weights, 32 of a row, bf16 scale": (by_32_bf16, None),
    "weights, 32 of a row (weight_only)": (by_32, None),
    "weights and inputs, tensor": (by_tensor, by_tensor),
    "weights and inputs, row": (by_row, by_row),
    "weights and inputs, block": (by_tile, by_part),
    "weights and inputs, 32 of a row": (by_32, by_32),
}


@torch.no_grad()
def emulate(model: Model, of_weights: Round, of_inputs: Round | None, kept: Collection[int] = ()) -> Model:
    """Round the weights of the linear layers in place, and their inputs on every forward; layers `kept` stay."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert of_inputs is not None
        return (of_inputs(inputs[0].float()).to(inputs[0].dtype), *inputs[1:])

    for layer in (layer for chunk in model.chunks for layer in chunk.decoder.layers if layer.layer_number not in kept):
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.weight.copy_(of_weights(module.weight.float()))
                if of_inputs is not None:
                    module.register_forward_pre_hook(hook)
    return model


def weight_error(model: Model, of_weights: Round) -> float:
    """Length of what rounding changes, over the weights' length; mean over matrices."""
    matrices = [
        p.float() for name, p in model.chunks[0].decoder.named_parameters() if "linear_" in name and p.dim() == 2
    ]
    return sum(float((of_weights(m) - m).norm() / m.norm()) for m in matrices) / len(matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    platform, checked = select_platform(config.run.device), preflight(config, 1, starts_run=False)
    init_distributed(platform)
    teacher, student = build_models(checked, platform)
    alignment = Alignment(teacher, student, config.distill, platform, config.run.micro_batch_size)
    plan = alignment.plan(filled_up(prompt_samples(checked), alignment.flow.planner.unit))
    losses = alignment.reduce(alignment.run(plan)).layer_loss

    def against(other: Model) -> Noise:
        return compare(teacher, other, plan, alignment.pairs, config.distill, alignment.space.of_teacher, platform)

    bf16 = config.teacher.model_copy(update={"dtype": "bf16"})
    in_bf16 = replace(checked, config=config.model_copy(update={"teacher": bf16}))
    found = {"bf16": against(in_dtype(in_bf16, teacher, platform))}
    for name, way in WAYS.items():
        found[name] = against(emulate(in_dtype(checked, teacher, platform), *way))
    depth = teacher.architecture.num_layers
    alone = found["weights, 32 of a row (weight_only)"]
    for name, kept in (
        ("weight_only, worst 2 kept", alone.worst[:2]),
        ("weight_only, worst 8 kept", alone.worst[:8]),
        ("weight_only, first 4 and last 4 kept", [*range(1, 5), *range(depth - 3, depth + 1)]),
    ):
        found[name] = against(emulate(in_dtype(checked, teacher, platform), by_32, None, kept))
    print(f"{plan.num_tokens} tokens; layer {depth // 2}, last block {depth - 1}, final norm {depth}: 1 - cosine and error; "
          "noise / student: least and most, where they differ; error of the weights")  # fmt: skip
    for name, noise in found.items():
        shares = [share_of_noise(loss, mine) for loss, mine in zip(noise.loss, losses, strict=True) if mine > 0]
        figures = " ".join(
            f"{1 - noise.cosine[layer - 1]:.1e} {noise.error[layer - 1]:.4f}"
            for layer in (depth // 2, depth - 1, depth)
        )
        of_weights = f"{weight_error(teacher, WAYS[name][0]):.4f}" if name in WAYS else ""
        print(f"{name:38} {figures}  {min(shares):.3f} {max(shares):.3f}  {of_weights}")
    print(f"layers that add the most by themselves, weight_only: {alone.worst[:8]}")
    record = {name: noise.as_json() for name, noise in found.items()}
    arguments.out.with_suffix(".json").write_text(json.dumps({"student_loss": losses, "ways": record}))
    draw(found, losses, arguments.out.with_suffix(".png"))


def draw(found: dict[str, Noise], losses: list[float], out: Path) -> None:
    """Left: error of the state after every teacher layer. Right: noise over the student's distance."""
    from matplotlib import pyplot

    matplotlib.use("Agg")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    colors = {"weights and inputs": ORANGE, "weights": BLUE, "weight_only": GREEN, "bf16": GRAY}
    styles = {"tensor": "-", "row": "--", "block": "-.", "block 128 x 128": "-.", "worst 8 kept": "--"}
    for name, noise in found.items():
        kind, _, scales = name.partition(", ")
        if kind == "weight_only" and scales != "worst 8 kept":
            continue
        style = dict(color=colors[kind], linestyle=styles.get(scales, ":"), label=name, linewidth=1.4)
        left.plot(range(1, len(noise.error) + 1), noise.error, **style)
        shares = [share_of_noise(loss, mine) for loss, mine in zip(noise.loss, losses, strict=True)]
        right.plot([pair.student_layer for pair in noise.pairs], shares, **style)
    right.axhline(LIMIT, color="black", linewidth=0.8)
    left.set(title="relative error of the state", xlabel="teacher layer", yscale="log")
    right.set(title="noise over the student's distance", xlabel="student layer", yscale="log")
    right.annotate("above a tenth the doctor warns", (1, LIMIT), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                   fontsize=7)  # fmt: skip
    for axis in (left, right):
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
