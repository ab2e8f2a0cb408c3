"""A teacher whose predictions nobody looks at has no LM head; one in a run with output terms or an evaluation has."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from checkpoints_conversion.live.weights import canonical_parameters
from oprd_megatron.config import parse_config
from oprd_megatron.placing import build_models
from oprd_megatron.planning import plan_run
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import train_records, train_run, with_layout

HEAD = "output_layer.weight"


def held(values: dict[str, Any]) -> tuple[int, bool, bool, int]:
    """On a rank: the teacher's stage, whether teacher and student have a head of their own, and bytes of the teacher."""
    checked = preflight(parse_config(values, "test"), dist.get_world_size(), starts_run=False)
    teacher, student = build_models(checked, select_platform("cpu"))
    mine, others = (canonical_parameters(model.chunks) for model in (teacher, student))
    return teacher.grid.coords.pp, HEAD in mine, HEAD in others, sum(p.nbytes for p in mine.values())


@pytest.mark.parametrize("wants", ["nothing", "terms", "eval"])
@pytest.mark.parametrize(("tied", "pp"), [(True, 2), (False, 1), (False, 2)])
def test_only_where_it_is_looked_at(values: dict[str, Any], wants: str, tied: bool, pp: int) -> None:
    """On the last stage, and in the plan's bytes; the student always has one. Without a head a run trains."""
    for name, layers in (("teacher", 5), ("student", 4)):
        tiny_hf_model("llama", values[name]["path"], tied=tied, num_layers=layers, std=0.1)
    run = {key: section for key, section in with_layout(values, pp=pp).items() if key != "eval" or wants == "eval"}
    if wants == "terms":
        run["output"] = {"terms": [{"kind": "full"}]}
    plan = plan_run(parse_config(run, "test"), pp)
    assert plan.teacher.has_head == (wants != "nothing")
    for stage, mine, others, size in run_ranks(pp, held, run):
        is_last = stage == pp - 1
        assert mine == (is_last and wants != "nothing") and others == is_last
        assert size == plan.teacher.memory[stage].weights
    if wants == "nothing":
        run["run"] = {**run["run"], "steps": 1}
        assert len(train_records(train_run(run))) == 1
