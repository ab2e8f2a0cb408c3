"""Start ranks on this machine, as torchrun does, and pass on their exit code."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

from oprd_megatron.config import RunConfig
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.entry import EXIT_TRY_AGAIN, EXIT_USER_ERROR


def default_num_ranks(config: RunConfig) -> int:
    """The ranks that the layouts name: up to the last one of `ranks`, or the product of the sizes, where a dp that is left out
    counts as 1. The largest of all models'."""

    def end(parallel: ParallelConfig) -> int:
        if parallel.num_ranks is not None:
            return parallel.first_rank + parallel.num_ranks
        return parallel.tp * parallel.cp * parallel.pp * (parallel.dp or 1)

    models = (config.teacher, *config.teachers, config.student)
    return max(end(model.parallel) for model in models)


def launch(module: str, arguments: list[str], num_ranks: int) -> int:
    """Run `python -m module arguments` on `num_ranks` local ranks and wait for them.

    Returns:
        0, or the exit code of the first rank that failed (2: a user's mistake, 75: stopped early; it has said so in one line).
    """
    if num_ranks == 1:
        return _alone([sys.executable, "-m", module, *arguments])
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0"
    )
    config.run_id, config.max_restarts = "oprd", 0
    try:
        elastic_launch(config, entrypoint=sys.executable)("-m", module, *arguments)
    except SignalException:  # it was passed on to the ranks, and they have ended
        return EXIT_TRY_AGAIN
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_USER_ERROR, EXIT_TRY_AGAIN):
            if code in codes:
                return code
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} failed with exit code {failure.exitcode}; its output is above", file=sys.stderr)
        return 1
    return 0


def _alone(command: list[str]) -> int:
    """Run one rank, which is told what this process is told, and ends in its own way. A terminal tells both of Ctrl-C."""
    rank = subprocess.Popen(command)

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGINT:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    code = rank.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code
