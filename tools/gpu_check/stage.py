"""One stage in its own process: `python -m gpu_check.stage NAME SETTINGS`. Its output is the stage's log.

A stage is a module with `CHECKS`: functions from settings to findings. A check that breaks is a finding too, and does not take
the others with it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator

from .findings import Finding, write_finding
from .settings import Settings

Check = Callable[[Settings], Iterable[Finding]]
MODULES = {name: name for name in ("env", "parity", "bench", "fp8", "train")} | {"vllm": "vllm_engine"}


def run_checks(checks: Iterable[Check], settings: Settings) -> Iterator[Finding]:
    """Findings of all checks, as they come."""
    for check in checks:
        try:
            yield from check(settings)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().split("\n")
            reason = (
                lines[-1] if lines[0].endswith(":") else lines[0]
            )  # another process's traceback ends with its reason
            yield Finding(check.__name__, "FAIL", f"{type(error).__name__}: {reason}"[:160])


def main(name: str, settings: Settings) -> None:
    """Run a stage and write what it finds to `<out>/<name>.jsonl`."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.ERROR)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")

    def imported(settings: Settings) -> Iterator[Finding]:
        module = importlib.import_module(f"{__package__}.{MODULES[name]}")
        yield from run_checks(module.CHECKS, settings)

    for finding in run_checks([imported], settings):
        print(finding, flush=True)
        write_finding(settings.out / f"{name}.jsonl", finding)


if __name__ == "__main__":
    main(sys.argv[1], Settings.from_json(sys.argv[2]))
