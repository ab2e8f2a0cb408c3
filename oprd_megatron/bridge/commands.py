"""`oprd bridge`: what has to be known about a pair of models before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oprd_megatron.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="""Fit a bridge between models of different widths (OPRD stage 1), or measure which layers belong together.

Both run on the grids of the run's config, on text that the student writes to its training prompts.""",
)

Config = Annotated[Path, typer.Argument(help="YAML file of the run; its bridge section says how.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, as many as you like; values are YAML.", show_default=False)
]
Ranks = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks on this machine; left out, as many as the layouts name.")
]


@app.command()
def fit(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="NAME.safetensors to make; left out, the run's distill.bridge.")
    ] = None,
    rank: Annotated[
        str | None, typer.Option(help="Directions to keep, or `auto`; left out, bridge.rank. All are measured.")
    ] = None,
    nproc: Ranks = None,
) -> None:
    """Fit the bridge that `distill.bridge` then names: NAME.safetensors, NAME.json (what it is, how good it is on held-out
    text) and NAME.png (every rank's cosine and explained variance).

    Example: `oprd bridge fit run.yaml --rank auto` then `oprd train run.yaml`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.ranks import default_num_ranks, launch

    settings = [*(overrides or []), *([f"bridge.rank={rank}"] if rank else [])]
    run = load_config(config, settings)
    target = out or run.distill.bridge
    if target is None:
        raise ConfigError("--out: the run names no distill.bridge; say where the bridge goes (NAME.safetensors)")
    ranks = nproc or default_num_ranks(run)
    raise typer.Exit(launch("oprd_megatron.bridge", ["fit", str(config), str(target), *settings], ranks))


@app.command("import")
def import_bank(
    ps_bank: Annotated[Path, typer.Argument(help="ps_bank.pt of the method's own code.", show_default=False)],
    config: Config,
    out: Annotated[Path, typer.Option(help="NAME.safetensors to make.")],
    overrides: Overrides = None,
    first_layer: Annotated[int, typer.Option(min=0, max=1, help="How the file counts layers: from 0 or from 1.")] = 0,
) -> None:
    """Turn a ps_bank.pt (read without running anything in it) into a bridge for the models of a run.

    Example: `oprd bridge import ps_bank.pt run.yaml --out bridge.safetensors`
    """
    from oprd_megatron.bridge.imported import import_ps_bank
    from oprd_megatron.config import load_config

    pairs = import_ps_bank(ps_bank, load_config(config, overrides or []), out, first_layer)
    mapped = ", ".join(f"{pair.student_layer}: {pair.teacher_layer}" for pair in pairs)
    typer.echo(f"bridge {out}\nset distill.layer_map: {{{mapped}}}")


@app.command("map")
def measure(
    config: Config,
    out: Annotated[Path, typer.Option(help="NAME.json to make; a heat map of the scores goes to NAME.png.")],
    overrides: Overrides = None,
    nproc: Ranks = None,
) -> None:
    """Measure how alike every student and teacher layer are, and write the best monotone map for `distill.layer_map`.

    Example: `oprd bridge map run.yaml --out map.json` then `oprd train run.yaml distill.layer_map=map.json`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.ranks import default_num_ranks, launch

    run = load_config(config, overrides or [])
    ranks = nproc or default_num_ranks(run)
    raise typer.Exit(launch("oprd_megatron.bridge", ["map", str(config), str(out), *(overrides or [])], ranks))
