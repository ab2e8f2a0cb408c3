"""The project's own teacher in fp8 against the same in bf16: bytes of its layers, seconds of a forward, error of its states.

Random Qwen2 layers at a 7B model's width, few of them, and a small vocabulary so that the embedding does not blur the figures.

Legend: M tokens of the pack, D width.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models import build_model, run_schedule
from oprd_megatron.parallel import resolve_layout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange
from oprd_megatron.representation.taps import attached_taps

from .env import measure
from .settings import Settings

ROUNDS = 5


@dataclass(frozen=True)
class TeacherFigures:
    """One teacher.

    Attributes:
        num_bytes: of its transformer layers' parameters and buffers; on CUDA what the allocator holds for the whole model.
        seconds: of a forward pass over the pack, its median.
        states: {layer: [M, D] fp32 on CPU}.
    """

    num_bytes: int
    seconds: float
    states: dict[int, torch.Tensor]


def write_teacher(folder: Path, is_cuda: bool) -> None:
    """Random bf16 weights: four layers of Qwen2-7B, or two small ones."""
    wide: dict[str, Any] = dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    )
    small: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(
        **(wide if is_cuda else small), num_hidden_layers=4 if is_cuda else 2, vocab_size=512, tie_word_embeddings=True,
        max_position_embeddings=32_768, initializer_range=0.02, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)


def teacher_figures(settings: Settings, linear: str) -> TeacherFigures:
    """Build, measure and let go of a frozen teacher whose linear layers are `linear` (`PrecisionConfig`)."""
    platform = select_platform("cuda" if settings.is_cuda else "cpu")
    if not dist.is_initialized():
        init_distributed(platform)
    with tempfile.TemporaryDirectory() as folder:
        write_teacher(Path(folder), settings.is_cuda)
        architecture = read_architecture(folder)
        layout = resolve_layout(
            ParallelConfig(), name="teacher", world_size=1, num_layers=architecture.num_layers, divisible={}
        )
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, 0)
        before = torch.cuda.memory_allocated() if settings.is_cuda else 0
        precision = PrecisionConfig.model_validate({"linear": linear})
        model = build_model(
            architecture, grid, platform,
            dtype=torch.bfloat16, hf_dir=Path(folder), frozen=True, precision=precision, head=False,
        )  # fmt: skip
    num_bytes = torch.cuda.memory_allocated() - before
    if not settings.is_cuda:
        layers = model.chunks[0].decoder.layers
        num_bytes = sum(tensor.nbytes for tensor in [*layers.parameters(), *layers.buffers()])
    length = 2048 if settings.is_cuda else 32
    texts = torch.randint(512, (4, length), generator=torch.Generator().manual_seed(1)).tolist()
    fed = micro_batches(texts, arrange([length] * 4, layout, 4), grid)
    states: dict[int, torch.Tensor] = {}

    def tap(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
        states[layer] = hidden.detach().flatten(0, 1).float().cpu()

    with attached_taps(model, range(1, architecture.num_layers + 1), "post_norm", tap):
        run_schedule(model, platform, fed, forward_only=True)
    forward = partial(run_schedule, model, platform, fed, forward_only=True)
    seconds = measure(forward, settings.device, ROUNDS)
    del model, forward
    gc.collect()  # a model holds itself
    return TeacherFigures(num_bytes, seconds, states)


def worst_error(found: TeacherFigures, expected: TeacherFigures) -> float:
    """|off| / |expected| of the layer where it is largest."""
    errors = [(found.states[layer] - state).norm() / state.norm() for layer, state in expected.states.items()]
    return float(torch.stack(errors).max())
