"""The `oprd` command. Each command checks its input first, does one thing, and says where the result is."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from checkpoints_conversion.commands import app as convert_app
from oprd_megatron.bridge.commands import app as bridge_app
from oprd_megatron.commands.evaluate import app as eval_app
from oprd_megatron.commands.rollout import app as rollout_app
from oprd_megatron.commands.teacher import app as teacher_app
from oprd_megatron.entry import one_line_errors, quiet_libraries, refuse_existing, refuse_missing_directory
from oprd_megatron.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""On-policy representation distillation (OPRD) on megatron-core: a frozen teacher teaches a student by aligning
hidden states on text that the student writes itself.

A run is one YAML file. Any value can be set on the command line: `oprd train run.yaml optimizer.lr=2e-4 student.parallel.tp=2`.
On several machines start `torchrun .. -m oprd_megatron.train run.yaml` yourself; `oprd train` starts ranks on this one.

A mistake of yours prints one line (what, where, what to do) and exits with code 2.""",
)

app.add_typer(convert_app, name="convert")
app.add_typer(eval_app, name="eval")
app.add_typer(bridge_app, name="bridge")
app.add_typer(rollout_app, name="rollout")
app.add_typer(teacher_app, name="teacher")

Config = Annotated[
    Path, typer.Argument(help="YAML file of the run. `oprd config` lists every key.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, as many as you like; values are YAML.", show_default=False)
]
Ranks = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Ranks on this machine; left out, as many as the layouts name."),
]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Ranks = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config and show the run's plan; start nothing.")
    ] = False,
) -> None:
    """Distil: rollouts, teacher states, loss, update; checkpoints, held-out evaluation, export and report on the way.

    Starting the same command again continues from the newest checkpoint in run.dir.

    Example: `oprd train examples/quickstart.yaml run.steps=10`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.ranks import default_num_ranks, launch

    if dry_run:
        from oprd_megatron.launching import dry_run as on_paper

        on_paper.dry_run(config, overrides or [])
        return
    run = load_config(config, overrides or [])
    raise typer.Exit(launch("oprd_megatron.train", [str(config), *(overrides or [])], nproc or default_num_ranks(run)))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; left out, as many as the layouts name.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Consecutive ranks on one machine; left out, the cluster's, or 8.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of a GPU, 80GB or 141GB; left out, the cluster's, or 80GB.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(help="YAML file of the machines' rates, for the time of a step; left out, 8 H100s a node."),
    ] = None,
    bridge_rank: Annotated[
        int | None, typer.Option(min=1, help="Plan as with a bridge of this rank, before there is a distill.bridge.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw who sends how much to whom; written anew.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures as json; written anew.")] = None,
) -> None:
    """Show what a run would look like: both grids, layer map, traffic, memory, the time of a step. Needs each model's
    config.json only, no GPU.

    A rank that does not fit into its GPU is an error, with three ways out.

    Example: `oprd plan examples/quickstart.yaml --world-size 16 student.parallel.tp=2 --png traffic.png`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.ranks import default_num_ranks
    from oprd_megatron.planning import check_room, plan_run, plan_text, step_times
    from oprd_megatron.planning.rates import read_cluster

    for out in (png, json_out):
        refuse_missing_directory(out)
    run = load_config(config, overrides or [])
    machines = read_cluster(cluster, gpus_per_node=gpus_per_node, gpu_memory=gpu_memory)
    ranks = world_size or default_num_ranks(run)
    planned = plan_run(run, ranks, machines.gpus_per_node, bridge_rank, machines.gpu_memory)
    times = step_times(run, planned, machines)
    typer.echo(plan_text(planned, times))
    if json_out is not None:
        json_out.write_text(json.dumps({**planned.as_json(), "times": times.as_json()}))
    if png is not None:
        from oprd_megatron.planning.heat_map import draw_heat_map

        draw_heat_map(planned, png)
    check_room(run, planned, machines.gpu_memory, bridge_rank)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory, or one of its checkpoints (iter_..).")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to make.")],
    best: Annotated[
        bool, typer.Option("--best", help="The run's best checkpoint, by its checkpoint.keep_best, not its newest.")
    ] = False,
) -> None:
    """Write a checkpoint's student as a Hugging Face directory (safetensors, config, tokenizer) that transformers loads.

    Example: `oprd export runs/quickstart student_hf`
    """
    from oprd_megatron.saving.export import export_checkpoint

    checkpoint, _ = export_checkpoint(run_dir, out, best)
    typer.echo(f"student of {checkpoint.name} in {out}")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run directory; the run may still be going.")],
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show the page on this machine's loopback; it refreshes itself. Ctrl-C ends it."),
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: of 127.0.0.1; 0 takes a free one.")] = 8137,
) -> None:
    """Write one HTML page with the run's curves, heat maps, phases, memory, samples, plan and config: run_dir/report.html.

    With --serve nothing is written. From another machine: `ssh -L 8137:127.0.0.1:8137 HOST`.

    Example: `oprd report runs/quickstart --serve`
    """
    if not serve:
        from oprd_megatron.evaluation.report import write_report

        typer.echo(write_report(run_dir))
        return
    from oprd_megatron.evaluation.serve import make_server

    with make_server(run_dir, port) as server, contextlib.suppress(KeyboardInterrupt):
        typer.echo(f"http://127.0.0.1:{server.server_port}/ shows {run_dir}; Ctrl-C ends it")
        server.serve_forever()


@app.command()
def doctor(
    config: Config,
    overrides: Overrides = None,
    precision: Annotated[
        bool, typer.Option("--precision", help="Measure what fp8 does to the teacher's states, and nothing else.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --precision: also write the figures, for teacher.precision.noise.")
    ] = None,
    nproc: Ranks = None,
) -> None:
    """Check a run on this machine before it starts, on a few tokens with its own models and layouts: one line a check.

    Versions on all ranks; bytes sent against the plan; loss and gradient of the student's layout against a smaller one; a
    student that is its own teacher gives 0. On several machines: `torchrun .. -m oprd_megatron.doctor CONFIG`.

    With --precision: for each supervised layer, how far the teacher in fp8 is from the teacher in dtype, beside how far the
    student is; without teacher.precision as if it said weight_only.

    Example: `oprd doctor examples/quickstart.yaml --precision`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.launching.ranks import default_num_ranks, launch

    run, settings = load_config(config, overrides or []), [str(config), *(overrides or [])]
    ranks = nproc or default_num_ranks(run)
    if out is not None and not precision:
        raise ConfigError("--out: goes with --precision; leave it out, or add --precision")
    refuse_existing(out)
    if precision:
        raise typer.Exit(launch("oprd_megatron.noise", [str(out or "-"), *settings], ranks))
    raise typer.Exit(launch("oprd_megatron.doctor", settings, ranks))


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run.", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """List every key of a run's YAML with its type, default and meaning; of a given run, print all settings as they come to.

    Example: `oprd config examples/quickstart.yaml recipe=oprd_plus_opd`
    """
    from oprd_megatron.config import dump_config, load_config
    from oprd_megatron.config.describe import describe_config

    typer.echo(describe_config() if config is None else dump_config(load_config(config, overrides or [])))


def main() -> None:
    """Console entry point."""
    quiet_libraries()  # before any command imports torch or mcore
    with one_line_errors():
        app()
    sys.exit(0)


if __name__ == "__main__":
    main()
