"""The last thing a run prints: what changed, what the student says now, and where everything is."""

from __future__ import annotations

from pathlib import Path

from oprd_megatron.evaluation.comparison import before_after_table, sample_answers
from oprd_megatron.logging import METRICS_FILE, read_records


def print_summary(run_dir: Path, report: Path) -> None:
    """Print the before/after table, sample answers, time, memory and paths of a run.

    Args:
        run_dir: holds metrics.jsonl.
        report: the page that `write_report` made.
    """
    records = read_records(run_dir / METRICS_FILE)
    evals = [record for record in records if record["kind"] == "eval"]
    summary = [record for record in records if record["kind"] == "summary"][-1]
    if len(evals) > 1:
        print(before_after_table(evals[0], evals[-1]))
        if evals[-1].get("samples"):
            print(sample_answers(evals[0], evals[-1]))
    print(f"steps        {summary['step']}")
    print(f"wall time    {summary['wall_seconds']:.0f} s on {summary['ranks']} rank(s)")
    print(f"peak memory  {summary['peak_memory_bytes'] / 2**30:.2f} GiB over all ranks")
    print(f"student      {summary['export'] or 'not exported: the run is not finished'}")
    print(f"run          {run_dir}")
    print(f"report       {report}")
