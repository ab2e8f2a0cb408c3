"""A run on paper, on any machine: its config is checked and its plan shown; nothing is started, and no weights are needed.

What `oprd train CONFIG --dry-run` and `examples/*.sh --dry-run` do. Imports neither mcore nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.config.schema import ModelConfig
from oprd_megatron.errors import LayoutError
from oprd_megatron.launching.ranks import default_num_ranks
from oprd_megatron.planning import Cluster, RunPlan, check_room, plan_run, plan_text, step_times
from oprd_megatron.planning.text import size

MODEL_CONFIGS = "model_configs"
"""Folder beside a run's YAML with NAME/config.json of published models, for runs whose models are not here."""


def dry_run(path: Path, overrides: list[str]) -> None:
    """Print what the run would be: what is not here, and the plan of each of its teachers.

    Raises:
        UserError: one line: the config is wrong, a model is unknown, or a rank would not fit into its GPU.
    """
    config = load_config(path, overrides)
    planned = with_published(config, path)
    for line in missing(config, planned):
        print(line)
    if config.teachers:
        show_several(planned, default_num_ranks(config), Cluster())
    else:
        show_plan(planned, default_num_ranks(config), Cluster())
    print("\ndry run: nothing was started")


def show_several(config: RunConfig, world_size: int, cluster: Cluster) -> None:
    """A plan for each of several teachers, and whether all of them fit together."""
    plans = {}
    for teacher in config.teachers:
        print(f"\nOF SEVERAL TEACHERS, WITH {teacher.name.upper()} ALONE")
        plans[teacher.name] = show_plan(config.of_teacher(teacher.name), world_size, cluster)
    weights = {name: plan.fullest.teacher for name, plan in plans.items()}
    waits = config.teaching is not None and config.teaching.host_budget is not None
    most = max(plan.fullest.device_bytes - (0 if waits else weights[name]) for name, plan in plans.items())
    whole = most + (0 if waits else sum(weights.values()))
    where = "wait in host memory" if waits else "stay on the device"
    print(f"\nall teachers together, which {where}: at most {size(whole)} on a rank")
    if whole > cluster.gpu_memory:
        raise LayoutError(
            f"{len(plans)} teachers and the student need {size(whole)} of a GPU's {size(cluster.gpu_memory)}; let "
            "teachers wait in host memory (teaching.host_budget), give them ranks of their own, or raise teachers[].parallel.tp"
        )


def show_plan(config: RunConfig, world_size: int, cluster: Cluster) -> RunPlan:
    """Print a plan, and refuse it if a rank does not fit."""
    width = width_before_fit(config)
    plan = plan_run(config, world_size, cluster.gpus_per_node, width, cluster.gpu_memory)
    print(plan_text(plan, step_times(config, plan, cluster)))
    check_room(config, plan, cluster.gpu_memory, width)
    return plan


def width_before_fit(config: RunConfig) -> int | None:
    """Numbers of a state through a bridge that the run names and that is not there yet; None if none is missing."""
    if config.distill.bridge is None or config.distill.bridge.exists():
        return None
    rank = config.bridge.max_rank if config.bridge.rank == "auto" else config.bridge.rank
    return rank - config.distill.bridge_head


def with_published(config: RunConfig, path: Path) -> RunConfig:
    """The run with the config.json files of `model_configs/` for models that are not here."""

    def here(section: ModelConfig) -> ModelConfig:
        published = path.parent / MODEL_CONFIGS / section.path.name
        if section.path.exists() or not published.is_dir():
            return section
        return section.model_copy(update={"path": published})

    return config.model_copy(
        update={
            "teacher": here(config.teacher),
            "student": here(config.student),
            "teachers": [here(teacher) for teacher in config.teachers],
        }
    )


def missing(config: RunConfig, planned: RunConfig) -> list[str]:
    """A line for models, and one for data, that a run would need and that are not here."""
    pairs = zip((config.teacher, *config.teachers, config.student), (planned.teacher, *planned.teachers, planned.student),
                strict=True)  # fmt: skip
    models = list(dict.fromkeys(str(a.path) for a, b in pairs if a.path != b.path))
    files = [config.rollout.prompts.path, *([config.eval.prompts.path] if config.eval else [])]
    if config.distill.bridge is not None:
        files.append(config.distill.bridge)
    lines = [f"not here, planned with the published config.json: {', '.join(models)}"] if models else []
    absent = list(dict.fromkeys(str(file) for file in files if not file.exists()))
    return lines + ([f"not here, and not needed for a plan: {', '.join(absent)}"] if absent else [])
