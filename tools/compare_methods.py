"""Compare ways to teach the same student: several runs of one config, each with its own settings, over several seeds.

    python tools/compare_methods.py tools/comparisons/cross_width.yaml --seeds 1,2,3 --out runs/cross_width

The file is a run's YAML with one section more, `arms`: {name: [overrides of the first stage, overrides of the second, ..]}. A
stage starts from the student that the stage before exported. `map: true` measures a layer map first, for every seed: overrides
name it `{map}`. `bridges: {ranks: [4, 8, ..]}` fits a bridge for it and cuts it to these ranks: `{bridge4}`, `{bridge8}`, ..
All arms get the same prompts, rollouts a step and number of steps (a stage has its share of them).

Finished runs are kept: start the same command again to go on. It writes OUT/results.json, OUT/results.md and OUT/results.png,
and prints the table: held-out KL(teacher || student) and cosine per arm, mean and standard deviation over seeds. The cosine
is measured in the space that the arm trains in (through its bridge or matrix), so only its change compares between arms. The
plot shows KL over steps and over seconds of training (evaluations left out); seconds compare only if nothing else ran, and
runs --at-once alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import yaml
from tqdm import tqdm

from oprd_megatron.bridge.artefact import read_info, write_bridge
from oprd_megatron.config.load import load_config, parse_config
from oprd_megatron.errors import ConfigError, UserError
from oprd_megatron.logging import METRICS_FILE, read_records
from oprd_megatron.representation.bridge import load_bridge
from oprd_megatron.representation.layer_map import LayerPair


def main() -> None:
    arguments = _arguments()
    values = yaml.safe_load(arguments.config.read_text())
    arms, bridges, maps = (values.pop(key, None) for key in ("arms", "bridges", "map"))
    if not isinstance(arms, dict) or not all(isinstance(stages, list) for stages in arms.values()):
        raise ConfigError(f"{arguments.config}: needs a section arms: {{name: [[key=value, ..], ..]}}")
    parse_config(values, str(arguments.config))
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = arguments.out / "base.yaml"
    base.write_text(yaml.safe_dump(values, sort_keys=False))
    steps = values["run"]["steps"]
    check_arms(base, arms, bridges)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        prepare = lambda seed: fit_bridges(base, arguments.out, bridges, bool(maps), seed)  # noqa: E731
        files = dict(zip(arguments.seeds, pool.map(prepare, arguments.seeds), strict=True))
        jobs = [(arm, seed) for seed in arguments.seeds for arm in arms]
        run = lambda job: run_arm(base, arguments.out, job[0], arms[job[0]], job[1], steps, files[job[1]])  # noqa: E731
        found = list(tqdm(pool.map(run, jobs), total=len(jobs), desc="runs", unit="run"))
    results = {arm: [records for (name, _), records in zip(jobs, found, strict=True) if name == arm] for arm in arms}
    (arguments.out / "results.json").write_text(json.dumps({"seeds": arguments.seeds, "arms": results}, indent=1))
    text = table(results)
    (arguments.out / "results.md").write_text(text + "\n")
    draw(results, arguments.out / "results.png")
    print(text)


def check_arms(base: Path, arms: dict[str, list[list[str]]], bridges: dict[str, Any] | None) -> None:
    """Refuse an arm whose settings are not a run's, before the first one starts."""
    names = {"map": "map.json", **{f"bridge{rank}": "bridge.safetensors" for rank in (bridges or {}).get("ranks", [])}}
    for arm, stages in arms.items():
        for overrides in stages:
            try:
                load_config(base, [text.format(**names) for text in overrides])
            except KeyError as missing:
                raise ConfigError(f"arms: {arm}: there is no {missing}; the file has {', '.join(names)}") from None
            except ConfigError as error:
                raise ConfigError(f"arms: {arm}: {error}") from None


def fit_bridges(base: Path, out: Path, wanted: dict[str, Any] | None, measured: bool, seed: int) -> dict[str, str]:
    """Measure a map if asked to, fit one bridge of the largest rank and cut it: {map: file, bridge<rank>: file}."""
    named, settings = {}, [f"run.seed={seed}"]
    if measured:
        named["map"] = str(out / f"map-seed{seed}.json")
        if not Path(named["map"]).exists():
            _call("bridge", "map", str(base), *settings, "--out", named["map"])
        settings.append(f"distill.layer_map={named['map']}")
    if not wanted:
        return named
    ranks = sorted(wanted["ranks"])
    whole = out / f"bridge-seed{seed}-rank{ranks[-1]}.safetensors"
    if not whole.exists():
        _call("bridge", "fit", str(base), *settings, f"bridge.rank={ranks[-1]}", "--out", str(whole))
    info = read_info(whole)
    pairs = [LayerPair(*pair) for pair in info.layer_map]
    widths = info.fingerprints.teacher.width, info.fingerprints.student.width
    bridge = load_bridge(whole, pairs, *widths, "cpu")  # type: ignore[arg-type]
    named[f"bridge{ranks[-1]}"] = str(whole)
    for rank in ranks[:-1]:
        path = out / f"bridge-seed{seed}-rank{rank}.safetensors"
        if not path.exists():
            write_bridge(path, bridge.sliced(slice(rank)), info.model_copy(update={"rank": rank}))
        named[f"bridge{rank}"] = str(path)
    return named


def run_arm(
    base: Path, out: Path, arm: str, stages: list[list[str]], seed: int, steps: int, files: dict[str, str]
) -> list[dict[str, Any]]:
    """Run an arm's stages one after the other. Returns its eval records: before, and after every stage."""
    records: list[dict[str, Any]] = []
    student: Path | None = None
    for number, overrides in enumerate(stages):
        folder = out / f"{arm}-seed{seed}-stage{number + 1}".replace(" ", "-").replace(",", "")
        is_last = number + 1 == len(stages)
        settings = [f"run.dir={folder}", f"run.seed={seed}", f"run.steps={steps // len(stages)}"]
        settings += [f"run.export={'false' if is_last else 'true'}", *(text.format(**files) for text in overrides)]
        settings += [f"student.path={student}"] if student else []
        _call("train", str(base), *settings)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes each; the figures stay
        step, seconds = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
        found = held_out(read_records(folder / METRICS_FILE), step, seconds)
        records += found if number == 0 else found[1:]
        student = folder / "student_hf"
    return records


def held_out(metrics: list[dict[str, Any]], step: int, seconds: float) -> list[dict[str, Any]]:
    """The eval records of a stage that begins at `step` after `seconds` of training: what is compared of them."""
    found = []
    for record in metrics:
        if record["kind"] == "train":
            seconds += sum(record["seconds"].values())
        if record["kind"] == "eval":
            figures = {key: record[key] for key in ("kl", "cross_entropy", "cosine", "tokens")}
            found.append({"step": step + record["step"], "seconds": seconds, **figures})
    return found


def table(results: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Markdown: first and last held-out figures of every arm, mean +- standard deviation over seeds."""
    lines = [
        "| arm | KL before | KL after | cross-entropy before | after | cosine before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in results.items():
        cells = []
        for key, at in [(key, at) for key in ("kl", "cross_entropy", "cosine") for at in (0, -1)]:
            values = [records[at][key] for records in seeds]
            cells.append("-" if None in values else _spread(values))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Held-out KL (cross-entropy between tokenizers) over steps and over seconds: mean of the seeds, and their standard
    deviation as a band."""
    key = "cross_entropy" if any(run[0]["kl"] is None for runs in results.values() for run in runs) else "kl"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for arm, runs in results.items():
        values = np.array([[record[key] for record in run] for run in runs])
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(runs) > 1 else 0.0
        for axis, of in zip(axes, ("step", "seconds"), strict=True):
            places = np.mean([[record[of] for record in run] for run in runs], axis=0)
            (drawn,) = axis.plot(places, mean, marker="o", markersize=3, label=arm)
            axis.fill_between(places, mean - spread, mean + spread, color=drawn.get_color(), alpha=0.15, linewidth=0)
            axis.set(xlabel=of if of == "step" else "seconds of training")
            axis.grid(alpha=0.2)
    what = "KL(teacher || student)" if key == "kl" else "cross-entropy"
    axes[0].set_ylabel(f"held-out {what}, nats a token")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _call(*arguments: str) -> None:
    command = [sys.executable, "-m", "oprd_megatron.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"oprd {' '.join(arguments)}: failed: {done.stderr.strip().splitlines()[-1:]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML of a run with a section `arms`")
    seeds = lambda text: [int(seed) for seed in text.split(",")]  # noqa: E731
    parser.add_argument("--seeds", type=seeds, default=[1, 2, 3], help="comma-separated (default 1,2,3)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and the results")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time (default 2); give each one thread")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
