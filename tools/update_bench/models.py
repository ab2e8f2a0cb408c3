"""The inputs of a case: random weights in files, both models opened from them on a world of one rank, and the rollouts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from checkpoints_conversion import read_architecture
from oprd_megatron.config.schema import OptimizerConfig, ParallelConfig, RecomputeConfig
from oprd_megatron.models import DTYPES, build_model
from oprd_megatron.optimizer import build_optimizer
from oprd_megatron.parallel import resolve_layout
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.representation.batch import Sample

from .arms import Bench
from .case import Case, read_rollouts


def write_model(folder: Path, case: Case) -> None:
    """Write random weights of the case's shape in Hugging Face form."""
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
    """Open both models from the same files, on a world of one rank. The teacher's weights are then moved by a tenth."""
    platform, architecture = select_platform(case.device), read_architecture(folder)
    init_distributed(platform)
    models = []
    for name, frozen in (("teacher", True), ("student", False)):
        layout = resolve_layout(ParallelConfig(), name=name, world_size=1, num_layers=case.layers, divisible={})
        with platform.scope():
            grid = build_grid(layout)
            init_mcore_globals(0, 0)
        recompute = None if frozen else RecomputeConfig(granularity=case.recompute)
        models.append(
            build_model(
                architecture,
                grid,
                platform,
                dtype=DTYPES[case.dtype],
                hf_dir=folder,
                frozen=frozen,
                recompute=recompute,
            )
        )
    teacher, student = models
    torch.manual_seed(1)
    for parameter in teacher.chunks[0].parameters():
        parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    # This learning rate moves nothing, so that every arm meets the same weights.
    still = OptimizerConfig(lr=1e-20, weight_decay=0.0)
    return Bench(case, teacher, student, build_optimizer(student, still, 10**6, platform, trains_head=True), platform)


def make_samples(case: Case) -> list[Sample]:
    """Random rollouts, or the first `responses` recorded ones, cut to `response` tokens."""
    if case.rollouts is None:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(case.vocab, (case.responses, case.prompt + case.response), generator=generator).tolist()
        return [Sample(tuple(of[: case.prompt]), tuple(of[case.prompt :])) for of in ids]
    lines = read_rollouts(case.rollouts, case.vocab)[: case.responses]
    return [Sample(tuple(prompt), tuple(response[: case.response])) for prompt, response in lines]
