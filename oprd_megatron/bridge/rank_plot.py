"""Held-out cosine and explained variance over the bridge's rank, as the paper's Figure 12 shows them."""

from __future__ import annotations

from pathlib import Path

from oprd_megatron.bridge.measure import HeldOutFigures


def draw_rank_curve(figures: HeldOutFigures, chosen: int, out: Path) -> None:
    """Write a png: the mean over pairs as a line, every pair as a faint one, the chosen rank marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, values, colour in (
        ("cosine through the bridge", figures.cosine, "tab:blue"),
        ("explained variance of the teacher", figures.explained, "tab:orange"),
    ):
        axes.plot(figures.ranks, values, color=colour, alpha=0.15, linewidth=0.8)
        axes.plot(figures.ranks, values.mean(1), color=colour, marker="o", label=f"{name}, mean over pairs")
    axes.axvline(chosen, color="grey", linestyle=":", label=f"rank {chosen}, kept")
    axes.set_xscale("log", base=2)
    axes.set_xticks(figures.ranks, [str(rank) for rank in figures.ranks])
    axes.set(xlabel="rank of the bridge", ylabel="on held-out rows", ylim=(min(0.0, figures.cosine.min()), 1.02))
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    staging = out.with_name(f".{out.name}")
    figure.savefig(staging, dpi=140, format="png")
    plt.close(figure)
    staging.replace(out)
