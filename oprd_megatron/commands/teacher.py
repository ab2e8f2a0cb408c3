"""`oprd teacher`: a run's teacher for trainers elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Serve a run's teacher to trainers elsewhere, in safetensors frames.")


@app.callback()
def _group() -> None:
    """Keeps `serve` a word of its own while it is the only command."""


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key.sub=value, as many as you like; values are YAML.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Whoever reaches it can use the teacher: keep it in your network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and prints it.")] = 8200,
    max_frame_mib: Annotated[int, typer.Option(min=1, help="Longest question or answer.")] = 256,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; left out, as many as teacher.parallel names.")
    ] = None,
) -> None:
    """Score token batches with the run's teacher until SIGTERM or Ctrl-C. With distill.bridge, states leave it projected.

    Example: `oprd teacher serve run.yaml teacher.parallel.tp=2 distill.bridge=bridge.safetensors`
    """
    from oprd_megatron.config import load_config

    run, max_bytes = load_config(config, overrides or []), max_frame_mib * 2**20
    parallel = run.teacher.parallel
    ranks = nproc or parallel.num_ranks or parallel.tp * parallel.cp * parallel.pp * (parallel.dp or 1)
    if ranks == 1:
        from oprd_megatron.library.teacher_service.server import serve as keep

        keep(run, host, port, max_bytes)
        return
    from torch.distributed.elastic.multiprocessing import SignalException

    from oprd_megatron.launching.ranks import launch

    arguments = [str(config), host, str(port), str(max_bytes), *(overrides or [])]
    try:
        code = launch("oprd_megatron.library.teacher_service", arguments, ranks)
    except SignalException:  # it has ended the ranks
        code = 0
    raise typer.Exit(code)
