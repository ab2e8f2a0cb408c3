"""`oprd rollout`: text without training, and servers that write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oprd_megatron.commands.default import default_command
from oprd_megatron.entry import refuse_existing

WRITE = "write"

app = typer.Typer(
    cls=default_command(WRITE),
    no_args_is_help=True,
    help="""Write the student's text without training, or keep vLLM servers for runs elsewhere.

`oprd rollout RUN.yaml --out FILE` writes what training would see in its first steps; `rollout.engine: file` trains on it.""",
)

Config = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, as many as you like; values are YAML.", show_default=False)
]
Weights = Annotated[Path | None, typer.Option(help="Hugging Face directory; left out, student.path.")]


@app.command(WRITE)
def write(
    config: Config,
    out: Annotated[Path, typer.Option(help="File to write: .parquet or .jsonl, a row or line for each response.")],
    overrides: Overrides = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint, a run, or a Hugging Face directory; left out, student.path.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Write the rollouts of this many training steps.")] = 1,
) -> None:
    """Write the student's responses to a file, by the run's engine; the word `write` may be left out.

    Example: `oprd rollout examples/quickstart.yaml --out rollouts.parquet rollout.temperature=0.7`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.rollout.record import record_rollouts
    from oprd_megatron.saving.export import readable

    refuse_existing(out)
    run = load_config(config, overrides or [])
    with readable(weights or run.student.path, run) as student:
        count = record_rollouts(run, student, out, steps)
    typer.echo(f"{count} responses in {out}")


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    weights: Weights = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Whoever reaches it can replace the weights: keep it in your network."),
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, help="Of the first; left out, rollout.server.port.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Servers, each on rollout.vllm.tp GPUs of its own.")] = 1,
    logs: Annotated[Path, typer.Option(help="Folder for their output.")] = Path("logs"),
) -> None:
    """Start vLLM servers for a run's student and keep them until Ctrl-C; prints what goes into rollout.server.urls.

    Example: `oprd rollout serve run.yaml --host 10.0.0.7 --count 8` on another machine, then
    `oprd train run.yaml rollout.engine=vllm_server rollout.server.urls=[http://10.0.0.7:8100,..]` here
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.rollout.vllm.serve import serve as keep

    run = load_config(config, overrides or [])
    keep(run, weights or run.student.path, host, port or run.rollout.server.port, count, logs)
