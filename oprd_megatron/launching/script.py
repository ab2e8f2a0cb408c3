"""The Python part of a run's own script, such as examples/oprd_qwen72b_to_7b.sh; its YAML lies beside it under the same name.

    torchrun [rendezvous flags] SCRIPT.sh [key=value ..]      the run, on this rank
    bash SCRIPT.sh [key=value ..]                             starts torchrun on this node, after a check
    sbatch SCRIPT.sh [key=value ..]                           starts torchrun on every node of the job
    .. SCRIPT.sh --dry-run [key=value ..]                     checks the config, prints the plan, starts nothing
    .. SCRIPT.sh --help

key=value overrides the YAML, as in `oprd train`: optimizer.lr=2e-5 student.parallel.tp=4. `oprd config SCRIPT.yaml` prints all
of it. A bridge that the YAML names and that is not there is fitted first, by the same ranks (`oprd bridge fit`). The same
command goes on from the newest checkpoint.

Exit codes of bash and sbatch: 0 done; 2 a mistake, in one line; 75 stopped with a checkpoint (SIGTERM, SIGUSR1, time is up),
start again; 1 a rank died more often than MAX_RESTARTS (3). torchrun's own are 0 and 1. docs/launching.md says more.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oprd_megatron.entry import EXIT_USER_ERROR, one_line_errors, quiet_libraries
from oprd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from oprd_megatron.config import RunConfig

FLAGS = ("--dry-run", "--help")
WITH_VALUE = ("--check", "--leave-code")
"""What the script's bash part asks for: --check GPUS_PER_NODE prints the nodes that are needed; --leave-code FILE has a rank
leave its exit code there, because torchrun does not pass it on."""


@dataclass(frozen=True)
class Arguments:
    """Of a script."""

    flags: frozenset[str]
    values: dict[str, str]
    overrides: list[str]

    @classmethod
    def read(cls, words: list[str]) -> Arguments:
        """Raises ConfigError: an option that there is not."""
        flags, values, overrides, rest = set(), {}, [], iter(words)
        for word in rest:
            if word in FLAGS:
                flags.add(word)
            elif word in WITH_VALUE:
                values[word] = next(rest, "")
            elif word.startswith("-"):
                raise ConfigError(f"{word}: no such option; there are --dry-run, --help and key=value")
            else:
                overrides.append(word)
        return cls(frozenset(flags), values, overrides)


def main(script: str) -> None:
    """Run a script on this rank, or say what it would be."""
    quiet_libraries()
    speaks = os.environ.get("RANK", "0") == "0"
    code = Path(sys.argv[sys.argv.index("--leave-code") + 1]) if "--leave-code" in sys.argv else None
    if code is not None and code.read_text() == str(EXIT_USER_ERROR):
        sys.exit(EXIT_USER_ERROR)  # torchrun has started this rank again, but it has said already what has to be mended
    with one_line_errors(code):
        given, config = Arguments.read(sys.argv[1:]), Path(script).with_suffix(".yaml")
        if "--help" in given.flags:
            print(__doc__.replace("SCRIPT", Path(script).stem) if speaks else "", end="")
        elif "--dry-run" in given.flags:
            if speaks:
                from oprd_megatron.launching.dry_run import dry_run

                dry_run(config, given.overrides)
        elif "--check" in given.values:
            check(config, given.values["--check"], given.overrides)
        else:
            run(config, given.overrides)


def check(path: Path, gpus: str, overrides: list[str]) -> None:
    """Print the number of nodes that the run needs; what can be known to be wrong is an error here, before torchrun starts."""
    from checkpoints_conversion import read_architecture
    from checkpoints_conversion.weights import hf_dir_of
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.world import nodes_needed
    from oprd_megatron.representation.grids import resolve_grids

    config = load_config(path, overrides)
    if not gpus.isdecimal() or int(gpus) == 0:
        raise ConfigError(f"NPROC_PER_NODE: {gpus!r} is no number of GPUs; set it to those of a node")
    nodes = nodes_needed(config, int(gpus), os.environ)
    for view in [config.of_teacher(teacher.name) for teacher in config.teachers] or [config]:
        models = read_architecture(hf_dir_of(view.teacher.path)), read_architecture(hf_dir_of(view.student.path))
        if view.teacher.parallel.layers_per_stage != "follow_student":
            resolve_grids(view, *models, nodes * int(gpus), alone=not config.teachers)
    if not config.rollout.prompts.path.is_file():
        raise ConfigError(f"rollout.prompts.path: {config.rollout.prompts.path} is not there; give a file of prompts")
    print(nodes)


def run(path: Path, overrides: list[str]) -> None:
    """Stage 1 if its bridge is not there yet, then the run: on this rank of torchrun's world."""
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.world import check_world

    config = load_config(path, overrides)
    check_world(config, os.environ)
    from oprd_megatron.loop import train

    if config.distill.bridge is not None and _is_absent(config.distill.bridge, config):
        from oprd_megatron.bridge.stage1 import fit

        fit(config, config.distill.bridge, stays=True)
    train(config)


def _is_absent(file: Path, config: RunConfig) -> bool:
    """Whether rank 0 does not find a file; a shared file system may show other ranks an older folder. Collective."""
    import torch.distributed as dist

    from oprd_megatron.parallel.hang import collective_minutes
    from oprd_megatron.platform import init_distributed, select_platform

    init_distributed(select_platform(config.run.device), collective_minutes(config.run.hang_minutes))
    absent = [not file.exists()]
    dist.broadcast_object_list(absent, src=0)
    return absent[0]
