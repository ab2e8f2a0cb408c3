"""One self-contained HTML page about a run: what changed, how it went, what it cost.

Works on a run that is still going or was stopped: what has not been measured yet is said so.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from oprd_megatron.evaluation import diagnosis_plots, plots, run_plots
from oprd_megatron.evaluation.run_records import RunRecords, Status, age_of, duration
from oprd_megatron.logging import METRICS_FILE, write_atomically
from oprd_megatron.run_directory.files import CONFIG_FILE, ENVIRONMENT_FILE, PLAN_FILE


def write_report(run_dir: str | Path) -> Path:
    """Write <run_dir>/report.html from what the run has written so far.

    Returns:
        Path of the page. It replaces an older one as a whole.

    Raises:
        UserError: the directory holds no metrics.
    """
    path = Path(run_dir, "report.html")
    write_atomically(path, render(Path(run_dir)))
    return path


def render(run_dir: Path, version: str | None = None) -> str:
    """The page.

    Args:
        run_dir: of the run; metrics.jsonl has to be there, config.yaml, plan.txt and environment.json are shown if they are.
        version: of a page that is served and refreshes itself (`serve.py`); None for one that stays as it is.

    Raises:
        UserError: the directory holds no metrics.
    """
    records = RunRecords.read(run_dir)
    texts = {
        name: path.read_text(encoding="utf-8") if (path := run_dir / name).exists() else ""
        for name in (CONFIG_FILE, PLAN_FILE, ENVIRONMENT_FILE)
    }
    config = yaml.safe_load(texts[CONFIG_FILE]) or {}
    total = config.get("run", {}).get("steps")
    return template("report.html.j2").render(
        title=run_dir.resolve().name,
        version=version,
        status=Status.of(records, total, age_of(run_dir / METRICS_FILE)),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        headlines=_headlines(records),
        sections=_sections(records),
        samples=_samples(records.evals),
        facts=_facts(records, config),
        surroundings=_surroundings(json.loads(texts[ENVIRONMENT_FILE] or "{}")),
        texts=[
            ("plan", "Plan", "What `oprd plan` says of this run.", texts[PLAN_FILE]),
            ("config", "Configuration", "Every setting, as it came to.", texts[CONFIG_FILE]),
        ],
    )


def template(name: str) -> jinja2.Template:
    """One of `templates/`; what goes into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oprd_megatron.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _headlines(records: RunRecords) -> list[dict[str, Any]]:
    """The figures on top: first and last value, the change, and whether it is for the better."""
    wanted: tuple[tuple[list[dict[str, Any]], str, str, str, int], ...] = (
        (records.evals, "kl", "held-out KL", "teacher || student, nats per token", -1),
        (records.evals, "cross_entropy", "held-out cross-entropy", "nats per token", -1),
        (records.evals, "cosine", "held-out cosine", "mean over layers", +1),
    )
    if not records.evals:
        wanted = (
            (records.train, "loss", "training loss", "first and last step", -1),
            (records.train, "cosine", "training cosine", "mean over layers, first and last step", +1),
        )
    cards = []
    for rows, key, label, unit, better in wanted:
        values = plots.column(rows, key)
        if key == "kl" and np.isnan(values).all():  # models with different tokenizers have none
            continue
        first, last = (values[0], values[-1]) if len(values) else (np.nan, np.nan)
        change = last - first
        relative = f" ({change / first:+.0%})" if better < 0 and first > 0 and np.isfinite(change) else ""
        cards.append(
            {
                "label": label,
                "unit": unit,
                "first": _number(first),
                "last": _number(last),
                "single": len(values) == 1,
                "change": f"{change:+.3f}{relative}" if np.isfinite(change) else "",
                "better": bool(change * better > 0),
            }
        )
    return cards


def _sections(records: RunRecords) -> list[dict[str, Any]]:
    train, evals = records.train, records.evals
    drift = plots.drift_plot(train, evals)
    figures = [
        (
            "Held-out distance to the teacher",
            "Measured on the teacher's own answers to prompts that are not trained on. Lower is closer. Training time "
            "leaves the evaluations out.",
            plots.held_out_plot(train, evals),
        ),
        ("Training loss", "On the student's own responses of each step.", plots.loss_plot(train)),
        (
            "Cosine per layer",
            "Student state against the state of its mapped teacher layer; brighter is more alike.",
            plots.cosine_heat_map(train, evals),
        ),
        (
            "Layers at the end",
            "On the training responses. A norm ratio of 1 means that student and teacher states are equally long.",
            plots.layers_plot(train),
        ),
        (
            "Next-token distributions",
            "On the held-out answers. A student that copies its teacher has its entropy, and its likeliest tokens.",
            diagnosis_plots.distributions_plot(evals),
        ),
        ("Responses", "Text that the student sampled to be trained on.", plots.response_plot(train)),
        ("Time", "Where the seconds of rank 0 went, phase by phase.", run_plots.time_plot(train)),
        ("Memory", "Of each rank's process on CPU; of its share of the GPU on CUDA.", run_plots.memory_plot(train)),
        ("Optimizer", "The gradient norm is taken before clipping.", plots.optimizer_plot(train)),
    ]
    if drift is not None:  # the run has a bridge
        caption = "Share of the student's states, in square length, that the bridge's frozen projection sees: every layer, and "
        figures.insert(4, ("Drift out of the bridge", caption + "their mean. Dotted lines are refits.", drift))
    terms, curves = diagnosis_plots.terms_plot(train, evals), diagnosis_plots.curves_plot(evals)
    if curves is not None:
        caption = "Held-out cosine, mean over layers, of the first and of the last tokens of an answer."
        figures.insert(3, ("Along a response", caption, curves))
    if terms is not None:
        caption = "Every term by itself, without its weight; the representation loss is called oprd."
        figures.insert(2, ("Terms of the loss", caption, terms))
    benchmarks = run_plots.benchmark_plot(records.benchmarks)
    if benchmarks is not None:
        caption = "Problems with known answers, asked again every so many steps with the same random numbers. Higher is better."
        figures.insert(0, ("Benchmarks", caption, benchmarks))
    several = _of_teachers(records)
    if several:  # layers are each teacher's own
        figures = [figure for figure in figures if figure[0] not in ("Cosine per layer", "Layers at the end")] + several
    return [
        {"title": title, "id": _slug(title), "caption": caption, "svg": svg and Markup(svg)}
        for title, caption, svg in figures
    ]


def _of_teachers(records: RunRecords) -> list[tuple[str, str, str | None]]:
    """Of several teachers: (title, caption, figure) of each one's cosines."""
    names = dict.fromkeys(name for record in [*records.train, *records.evals] for name in record.get("teachers", {}))
    caption = "On the samples that this teacher teaches, and on its own held-out answers."
    figures = []
    for name in names:
        train, evals = (
            [{**record["teachers"][name], "step": record["step"]} for record in some if name in record["teachers"]]
            for some in (records.train, records.evals)
        )
        figures.append((f"Cosine per layer, teacher {name}", caption, plots.cosine_heat_map(train, evals)))
    return figures


def _samples(evals: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompt, the student's answers before and after ("" where there is no second evaluation), the teacher's."""
    shown = [record["samples"] for record in evals if record.get("samples")]
    if not shown:
        return []
    afters = shown[-1] if len(shown) > 1 else [{"response": ""}] * len(shown[0])
    return [
        {
            "prompt": before["prompt"],
            "before": before["response"],
            "after": after["response"],
            "teacher": before["teacher"],
        }
        for before, after in zip(shown[0], afters, strict=False)
    ]


def _facts(records: RunRecords, config: dict[str, Any]) -> list[tuple[str, str]]:
    train, summary = records.train, records.summary
    seconds = plots.training_seconds(train).sum()
    named = {f"teacher {entry['name']}": entry for entry in config.get("teachers") or []}
    models = {**(named or {"teacher": config.get("teacher")}), "student": config.get("student")}
    facts: list[tuple[str, str]] = [(role, model["path"]) for role, model in models.items() if model]
    facts.append(("steps", f"{train[-1]['step'] if train else 0}"))
    if summary:
        facts += [
            ("wall time", duration(summary["wall_seconds"])),
            ("peak memory, all ranks", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
            ("ranks", f"{summary['ranks']}"),
            ("exported student", summary["export"] or "none"),
        ]
    if train:
        facts += [
            ("time in training steps", duration(seconds)),
            ("supervised tokens", f"{np.nansum(plots.column(train, 'supervised_tokens')):,.0f}"),
            ("tokens per second, last step", f"{plots.column(train, 'tokens_per_second')[-1]:,.0f}"),
        ]
        probe = plots.column(train, "probe_difference")
        if np.isfinite(probe).any():
            facts.append(("largest engine-to-trainer difference", f"{np.nanmax(probe):.2g} nats"))
    if records.evals:
        facts.append(("held-out tokens", f"{records.evals[-1]['tokens']:,}"))
    return facts


def _surroundings(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Of environment.json: (name, value) to show."""
    if not environment:
        return []
    hosts = ", ".join(f"{host} ({ranks})" for host, ranks in environment["hosts"].items())
    return [
        ("started", environment["started"].replace("T", " ").replace("+00:00", " UTC")),
        ("ranks", str(environment["ranks"])),
        ("machines, with their ranks", hosts),
        ("device", environment["device"]),
        ("commit", environment["commit"] or "not from a git checkout"),
        ("Python", environment["python"]),
        *environment["versions"].items(),
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
