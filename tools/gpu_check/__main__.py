"""The command line. argparse and not typer: it has to start where nothing but torch is installed, to say what is missing."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NoReturn

from .findings import Finding, as_json, table
from .settings import CHECKOUT, Settings, version
from .stages import LIMIT_SECONDS, Stage, all_stages, run_stage

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
DESCRIPTION = """Check and measure on one GPU what a GPU is needed for. Needs no network; installs and downloads nothing. What
rests on a package that is optional and absent (Transformer Engine, vLLM, apex) says so and is skipped. Ends with a table, and
code 1 if anything failed. Example: bash tools/gpu_check.sh --device cpu --stage env --stage parity --out /tmp/check"""


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"gpu_check: {message}; see --help\n")


def parse(arguments: list[str], stages: list[Stage]) -> argparse.Namespace:
    """Read the options.

    Args:
        stages: to choose from.
    """
    parser = Parser(prog="gpu_check", description=DESCRIPTION)
    names = [stage.name for stage in stages]
    parser.add_argument("--stage", action="append", choices=names, help="one of the stages; repeatable; left out, all")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda where torch sees it"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and results.json; made if needed")
    parser.add_argument(
        "--student", type=Path, help="Hugging Face directory for train and vllm, instead of a tiny model"
    )
    parser.add_argument("--teacher", type=Path, help="the same of train's teacher; both or neither")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds after which a stage is cut (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.limit <= 0:
        parser.error(f"--limit {options.limit:g}: give seconds above 0")
    if (options.student is None) != (options.teacher is None):
        parser.error("give both --student and --teacher, or neither")
    for model in (options.student, options.teacher):
        if model is not None and not (model / "config.json").is_file():
            parser.error(f"{model} is no Hugging Face directory: it has no config.json")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is not a directory")
    options.device = decide_device(options.device, parser)
    return options


def decide_device(asked: str, parser: Parser) -> str:
    """cuda or cpu; one line and code 2 where that cannot be."""
    if version("torch") is None:
        parser.error(f"{sys.executable} has no torch; set PYTHON to one that has it")
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device cuda, but torch {torch.__version__} sees no GPU; install a CUDA build or use --device cpu"
        )
    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str]) -> int:
    """Run the chosen stages and print the table. Returns the exit code."""
    stages = all_stages()
    options = parse(arguments, stages)
    options.out.mkdir(parents=True, exist_ok=True)
    models = [None if path is None else path.resolve() for path in (options.student, options.teacher)]
    settings = Settings(options.device, options.out.resolve(), *models)
    results: dict[str, tuple[float, list[Finding]]] = {}
    for stage in stages:
        if options.stage and stage.name not in options.stage:
            continue
        print(f"gpu_check: {stage.name} on {settings.device}, at most {options.limit:g} s", flush=True)
        started = time.monotonic()
        found = run_stage(stage, settings, options.limit)
        results[stage.name] = (time.monotonic() - started, found)
        record = {"device": settings.device, "checkout": str(CHECKOUT), "stages": as_json(results)}
        (settings.out / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [(name, finding) for name, (_, findings) in results.items() for finding in findings]
    print(f"\n{table(rows)}\n\n{_total(results)}; logs and results.json in {settings.out}")
    return EXIT_FAILED if any(finding.verdict == "FAIL" for _, finding in rows) else 0


def _total(results: dict[str, tuple[float, list[Finding]]]) -> str:
    seconds = ", ".join(f"{name} {seconds:.0f} s" for name, (seconds, _) in results.items())
    verdicts = [finding.verdict for _, findings in results.values() for finding in findings]
    return ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "FAIL", "skip")) + f" ({seconds})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
