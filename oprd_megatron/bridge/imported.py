"""`oprd bridge import`: a bridge of the method's own code, for the models of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from checkpoints_conversion.weights import check_weights
from oprd_megatron.bridge.artefact import BridgeInfo, write_bridge
from oprd_megatron.bridge.authors import read_ps_bank
from oprd_megatron.config import RunConfig
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import CheckpointError
from oprd_megatron.preflight import fingerprints
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.rollout.tokenizer import load_tokenizer
from oprd_megatron.run_directory.checks import check_writable


def import_ps_bank(source: Path, config: RunConfig, out: Path, first_layer: int) -> list[LayerPair]:
    """Write the bridge, and say which layers it pairs. Its quality is not measured.

    Raises:
        UserError: `out` cannot be written.
        CheckpointError: the file cannot be read, or is not for models of these widths and depths.
    """
    refuse_several(config, "oprd bridge import")
    check_writable(out.parent, "--out")
    teacher, student = check_weights(config.teacher.path), check_weights(config.student.path)
    pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
    bank = read_ps_bank(source, cast(Literal[0, 1], first_layer), pairs)
    for name, width, found in (
        ("teacher", teacher.hidden_size, next(iter(bank.bridge.teacher.values())).size(1)),
        ("student", student.hidden_size, next(iter(next(iter(bank.bridge.student.values())).values())).size(1)),
    ):
        if width != found:
            raise CheckpointError(
                f"{source}: is for a {name} of width {found}, this run's {name} has {width}; give the bank of these models"
            )
    info = BridgeInfo(
        projector=bank.projector,
        rank=bank.bridge.rank,
        layer_map=[(pair.student_layer, pair.teacher_layer) for pair in bank.pairs],
        fit={"imported_from": source.name},
        held_out=None,
        ranks={},
        fingerprints=fingerprints(
            config, (teacher, student), (load_tokenizer(config.teacher.path), load_tokenizer(config.student.path))
        ),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bridge(out, bank.bridge, info)
    return bank.pairs
