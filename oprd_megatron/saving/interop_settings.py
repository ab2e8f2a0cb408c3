"""What makes a run's checkpoint one that Megatron-LM and Megatron-Bridge start from: the student's settings in their notation,
as `oprd convert import` writes them, and its config.json and tokenizer beside it.

They load the weights; the optimizer's state is this project's (`args` says that there is none, as of a converted model). With
heads padded for tp (`pad_heads`) a model of config.json's sizes does not fit the tensors: then there are no settings, and
`oprd export` writes the student without padding.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_conversion.convert.hf_files import write_companions
from checkpoints_conversion.convert.hf_to_megatron import COMPANIONS
from checkpoints_conversion.interop import RUN_CONFIG, common_state, run_config_yaml
from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.models import Model


@dataclass(frozen=True)
class InteropSettings:
    """Of a student.

    Attributes:
        source: where the student came from.
        dtype: of its parameters, as safetensors spells it.
        common: for common.pt.
        run_config: run_config.yaml; None with padded heads.
    """

    source: Path
    dtype: str
    common: dict[str, Any] = field(default_factory=dict)
    run_config: str | None = None

    def write_files(self, checkpoint: Path, folder: Path) -> None:
        """run_config.yaml into the checkpoint, and once config.json and tokenizer into the folder of all checkpoints. On one
        rank."""
        if self.run_config is not None:
            (checkpoint / RUN_CONFIG).write_text(self.run_config, encoding="utf-8")
        companions = folder / COMPANIONS
        if not companions.is_dir():
            staging = folder / f"{COMPANIONS}.incomplete"
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            write_companions(hf_dir_of(self.source), staging, {self.dtype})
            staging.rename(companions)


def interop_settings(student: Model) -> InteropSettings:
    """The same on every rank."""
    arch, layout = student.architecture, student.grid.layout
    dtype = "BF16" if student.config.bf16 else "F32"
    if student.sharding.num_query_groups_padded != arch.num_query_groups:
        return InteropSettings(student.source, dtype)
    rows = student.sharding.vocab_size_padded
    common, _ = common_state(arch, dtype, tp=layout.tp, pp=layout.pp, padded_vocab_size=rows)
    return InteropSettings(student.source, dtype, common, run_config_yaml(arch, dtype, layout.tp, layout.pp, ep=1))
