"""What a run writes to its directory before its first step, and on from a checkpoint."""

import json
from pathlib import Path

import torch.distributed as dist

from oprd_megatron.config import parse_config
from oprd_megatron.logging import read_records
from oprd_megatron.logging.memory import world_memory_mib
from oprd_megatron.loop import log, open_run
from oprd_megatron.platform import select_platform
from oprd_megatron.saving.checkpoint import Progress
from tests.ranks import run_ranks
from tests.training.runs import changed, tiny_run


def open_twice(values):
    """Steps 1-3, then on from 2; returns the memory record."""
    config = parse_config(values, "test")
    for step, fresh, records in ((0, True, (1, 2, 3)), (2, False, (3,))):
        logger = open_run(config, Progress(step, step), fresh)
        for number in records:
            log(logger, {"kind": "train", "step": number, "fresh": fresh})
        logger.close()
    if dist.get_rank() == 1:
        held = bytearray(300 * 2**20)
        memory = world_memory_mib(select_platform("cpu").device)
        del held
        return memory
    return world_memory_mib(select_platform("cpu").device)


def test_a_run_directory_says_where_it_runs_and_how_it_is_laid_out(tmp_path):
    """Environment and plan are there before the first step; a resumed run goes on in its loggers; memory is by rank."""
    values = changed(tiny_run(tmp_path), teacher={"parallel": {"tp": 2}}, student={"parallel": {"tp": 2}})
    memories = run_ranks(2, open_twice, values)
    folder = Path(values["run"]["dir"])
    found = json.loads((folder / "environment.json").read_text())
    assert found["ranks"] == 2 and list(found["hosts"].values()) == [2] and "torch" in found["versions"]
    assert (folder / "plan.txt").read_text().startswith("2 ranks on 1 node of 2; both models on the same ranks")
    records = read_records(folder / "metrics.jsonl")
    assert [(record["step"], record["fresh"]) for record in records] == [(1, True), (2, True), (3, False)]
    assert memories[0] == memories[1] and len(memories[0]["held"]) == 2
    assert memories[0]["held"][1] >= 300 and memories[0]["peak"][1] >= memories[0]["held"][1]
    assert memories[0]["held"][1] > memories[0]["held"][0] + 200
