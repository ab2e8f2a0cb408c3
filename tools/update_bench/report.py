"""The figures of all cases: a table, the bars, the checks and the machine as markdown, and a plot.

A result is what `run.measure` returns of a case. A round is one measured step of one arm. Ratios are taken between steps of the
same round, as the machine's load changes from round to round.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from .case import GIB, MIB, TERMS

Result = dict[str, Any]

AGREE = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of losses and gradient norms of arms that compute the same thing."""
SAME = [("oprd", "release"), *((f"opd-{term}", f"dense-{term}") for term in TERMS)]
"""Pairs of arms that compute the same thing."""
BARS_ARE_FOR = "slice"
"""The shape that the bars were set for."""
BARS = [
    ("peak of oprd, of release's", "oprd", "release", 0.5, ["peak"]),
    ("peak of oprd, of our top-16's", "oprd", "opd-topk", 0.9, ["peak"]),
    ("time of oprd, of our top-16's (update; with the teacher's forward)", "oprd", "opd-topk", 0.95, ["update", "whole"]),
    ("peak of our top-16, of dense top-16's", "opd-topk", "dense-topk", 0.5, ["peak"]),
]  # fmt: skip
"""(text, arm, arm that it is divided by, largest ratio that passes, figures that all have to pass)."""


def figure(of: dict[str, float], name: str) -> float:
    """Read a figure off a round, or off an arm's medians: `peak` in bytes, or the seconds of `teacher`, `update` or both
    (`whole`), which are those that the process computed where they are known."""
    if name == "peak":
        return of["peak_bytes"]
    phases = ("teacher", "update") if name == "whole" else (name,)
    return sum(of.get(f"{phase}_cpu_seconds", of[f"{phase}_seconds"]) for phase in phases)


def ratios(result: Result, arm: str, other: str, name: str) -> list[float]:
    """(median, smallest, largest) of an arm's figure over another's in the same round; empty if one was not measured."""
    pairs = zip(rounds_of(result, arm), rounds_of(result, other), strict=False)
    values = [figure(mine, name) / figure(theirs, name) for mine, theirs in pairs]
    return [statistics.median(values), min(values), max(values)] if values else []


def rounds_of(result: Result, arm: str) -> list[dict[str, float]]:
    """An arm's rounds. There are none if it did not fit or is not an arm of the case."""
    return result["arms"].get(arm, {"rounds": []})["rounds"]


def judge(result: Result) -> list[dict[str, Any]]:
    """Hold a case against the bars. One whose arms were not measured is left out."""
    judged = []
    for text, arm, other, at_most, names in BARS:
        found = [ratios(result, arm, other, name) for name in names]
        if all(found):
            passed = all(median <= at_most for median, *_ in found)
            judged.append({"bar": text, "at_most": at_most, "ratios": found, "passed": passed})
    return judged


def disagreements(result: Result) -> list[str]:
    """Name the arms that should compute the same thing and do not."""
    arms, bound, told = result["arms"], AGREE[result["case"]["dtype"]], []
    for arm, other in SAME:
        both = rounds_of(result, arm) and rounds_of(result, other)
        for key in ("loss", "grad_norm") if both else ():
            mine, theirs = arms[arm][key], arms[other][key]
            if abs(mine - theirs) > bound * max(abs(mine), abs(theirs), 0.1):  # the sampled loss is a mean about 0
                told.append(f"{arm} and {other} differ in {key}: {mine:.6g}, {theirs:.6g}")
    return told


def table(results: list[Result]) -> str:
    """All cases and arms, as markdown."""
    lines = [
        "| case | arm | peak above resident, MiB | peak resident set, MiB | peak / oprd | teacher forward, s | update, s | "
        "update on the clock, s | time / oprd (teacher + update) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for arm, of in result["arms"].items():
            start = f"| {result['name']} | {arm} |"
            if "failed" in of:
                lines.append(f"{start} {of['failed']} | | | | | | |")
                continue
            rss = f"{of['peak_rss_bytes'] / MIB:,.1f}" if "peak_rss_bytes" in of else "-"
            size = next(iter(ratios(result, arm, "oprd", "peak")), math.nan)
            times = ratios(result, arm, "oprd", "whole")
            time = "{:.2f} [{:.2f}-{:.2f}]".format(*times) if times else "nan "
            lines.append(
                f"{start} {of['peak_bytes'] / MIB:,.1f} | {rss} | {size:.2f} | {figure(of, 'teacher'):.2f} | "
                f"{figure(of, 'update'):.2f} | {of['update_seconds']:.2f} | {time} |"
            )
    return "\n".join(lines)


def notes(results: list[Result], shape: str) -> str:
    """Bars, agreement of arms and of the two ways to count memory, and the machine, as markdown."""
    lines = []
    if shape == BARS_ARE_FOR:
        for of in judge(results[0]):
            figures = "; ".join("{:.3f} [{:.3f}-{:.3f}]".format(*ratio) for ratio in of["ratios"])
            lines.append(f"- {'pass' if of['passed'] else 'MISS'}: {of['bar']}: {figures}, at most {of['at_most']}")
    else:
        lines.append(f"- the bars are for `--shape {BARS_ARE_FOR}`; they do not judge `{shape}`")
    lines += [f"- WRONG: {text}" for result in results for text in disagreements(result)]
    arms = [of for result in results for of in result["arms"].values() if of.get("peak_rss_bytes")]
    if arms:
        over = [of["peak_rss_bytes"] / of["peak_bytes"] for of in arms]
        lines.append(
            f"- the process's peak resident set rises by {min(over):.2f}-{max(over):.2f} of the allocator's count (median "
            f"{statistics.median(over):.2f})"
        )
    machine, loads = results[0]["machine"], [result["machine"]["load"] for result in results]
    lines.append(
        f"- {machine['name']}, {machine['threads']} threads on {machine['cores']} cores, load {min(loads):.1f}-"
        f"{max(loads):.1f}, torch {machine['torch']}; resident in the first case: "
        f"{results[0]['resident_bytes'] / GIB:.2f} GiB"
    )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Draw memory above and time below: the first case as bars, then lines against length, width and vocabulary."""
    from matplotlib.figure import Figure

    fields = {"length": "response", "width": "width", "vocabulary": "vocab"}
    middle = [result for result in results if result["case"]["varies"] == "terms"]
    groups = {name: [r for r in results if r["case"]["varies"] == name] + middle for name in fields}
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    drawing = Figure(figsize=(4.2 * (1 + len(groups)), 7))
    axes = drawing.subplots(2, 1 + len(groups), squeeze=False)
    colors = {"oprd": "C0", "opd-topk": "C1", "dense-topk": "C2", "release": "C3"}
    rows = [("peak above resident, GiB", "peak", GIB), ("teacher forward + update, s", "whole", 1)]
    for row, (label, figure_name, unit) in zip(axes, rows, strict=True):
        first = {arm: figure(of, figure_name) / unit for arm, of in results[0]["arms"].items() if of["rounds"]}
        row[0].bar(list(first), list(first.values()), color=[colors.get(arm, "0.6") for arm in first])
        row[0].set_xticks(range(len(first)), list(first), rotation=45, ha="right")
        row[0].set_ylabel(label)
        for place, (name, group) in zip(row[1:], groups.items(), strict=True):
            group.sort(key=lambda result: result["case"][fields[name]])
            for arm, color in colors.items():
                shown = [result for result in group if rounds_of(result, arm)]
                heights = [figure(result["arms"][arm], figure_name) / unit for result in shown]
                place.plot([r["case"][fields[name]] for r in shown], heights, "o-", color=color, label=arm)
            place.set(xlabel={"length": "response tokens"}.get(name, name), ylim=(0, None))
            place.set_xscale("log", base=2)
    for place, title in zip(axes[0], [results[0]["name"], *("around " + of["name"] for of in middle)], strict=False):
        place.set_title(title.replace(" layers, ", " layers,\n"), fontsize=9)
    if groups:
        axes[0, 1].legend(fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)
