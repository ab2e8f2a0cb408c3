"""`oprd convert ..`, also `python -m checkpoints_conversion ..`: the command line of the converters."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from checkpoints_conversion.convert.memory import peak_bytes
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from oprd_megatron.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Convert model weights between Hugging Face and Megatron (torch_dist), on a CPU, without ever holding the model.

A conversion writes to OUT.incomplete and renames it to OUT when it is complete; what was finished when it was killed is kept,
and `--resume` goes on from there. `verify` then says whether both sides compute the same, layer by layer.

A mistake of yours prints one line (what, where, what to do) and exits with code 2.""",
)

Dtype = Annotated[
    str | None, typer.Option(help="Round weights to fp32, bf16 or fp16; left out, each tensor keeps its dtype.")
]
ShardSize = Annotated[
    str, typer.Option(help="No file is larger, unless one tensor is: bytes, or with KB, MB, GB, KiB, MiB, GiB.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that convert at the same time.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an unfinished conversion; finished files are checked and kept.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or begin an unfinished conversion again.")]
Strict = Annotated[
    bool,
    typer.Option(
        help="Refuse what is not understood. With --no-strict, what the model does not use is reported and left out."
    ),
]
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DEFAULT_WORKERS = Options().workers


@app.command("import")
def import_command(
    hf_dir: Annotated[
        Path, typer.Argument(help="Hugging Face directory (safetensors or .bin), or a .gguf file.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Megatron checkpoint directory to make.", show_default=False)],
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    workers: Workers = DEFAULT_WORKERS,
    resume: Resume = False,
    overwrite: Overwrite = False,
    strict: Strict = True,
    make_vocab_size_divisible_by: Annotated[
        int,
        typer.Option(
            min=1, help="Pad the vocabulary to a multiple of this times --tp; mcore pads anew while it loads."
        ),
    ] = Options.vocab_multiple,
    tp: Annotated[
        int,
        typer.Option(min=1, help="Cut files as this many tensor-parallel ranks read them; any layout loads any cut."),
    ] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Cut files as this many pipeline stages read them.")] = 1,
) -> None:
    """Hugging Face to Megatron: one checkpoint that mcore loads at any TP, PP and EP.

    Example: `oprd convert import Qwen2.5-72B-Instruct qwen72b_megatron`
    """
    from checkpoints_conversion.convert.hf_to_megatron import import_hf

    options = Options(
        _dtype(dtype), _size(max_shard_size), workers, resume, overwrite, strict, make_vocab_size_divisible_by, tp, pp
    )
    _run(lambda progress: import_hf(hf_dir, out, options, progress), out)


@app.command("export")
def export_command(
    megatron_dir: Annotated[
        Path,
        typer.Argument(
            help="Megatron checkpoint (torch_dist), or a directory with its newest one.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to make.", show_default=False)],
    like: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face directory that gives config, tokenizer, chat template; left out, what import kept."
        ),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    workers: Workers = DEFAULT_WORKERS,
    resume: Resume = False,
    overwrite: Overwrite = False,
    strict: Strict = True,
) -> None:
    """Megatron to Hugging Face: safetensors, index, config, tokenizer and chat template, as transformers and vLLM load them.

    Example: `oprd convert export qwen72b_megatron Qwen2.5-72B-back`
    """
    from checkpoints_conversion.convert.megatron_to_hf import export_megatron

    options = Options(_dtype(dtype), _size(max_shard_size), workers, resume, overwrite, strict)
    _run(lambda progress: export_megatron(megatron_dir, out, options, progress, like), out)


@app.command("verify")
def verify_command(
    a: Annotated[
        Path,
        typer.Argument(
            help="Hugging Face directory, .gguf file or Megatron checkpoint.", metavar="A", show_default=False
        ),
    ],
    b: Annotated[Path, typer.Argument(help="The other one.", metavar="B", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line, or .jsonl with `prompt` or `text`; left out, built-in texts."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Cut or repeat each prompt to this many.")] = 64,
    compute_dtype: Annotated[
        str, typer.Option(help="fp32 compares hidden states; bf16 the next-token distributions.")
    ] = "fp32",
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="Compare configs and weights only.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Largest relative difference of a token's state and of a tensor (bf16: of a tensor, and largest KL).",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Hugging Face directory that gives a Megatron checkpoint's config and tokenizer."),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write all figures as json; written anew.")] = None,
) -> None:
    """Are two models the same, and do they compute the same? Configs, every weight, then hidden states layer by layer.

    No more than one layer is in memory at a time, so any model fits. Exit code 0: equal; 1: they differ, and the first layer
    that does is named; 2: a mistake of yours.

    Example: `oprd convert verify Qwen2.5-72B-Instruct qwen72b_megatron`
    """
    from checkpoints_conversion.verify import VerifyOptions, report_text, verify

    if compute_dtype not in ("fp32", "bf16"):
        raise UserError(f"--compute-dtype {compute_dtype}: choose fp32 or bf16")
    if json_out is not None and not json_out.parent.is_dir():
        raise UserError(f"{json_out}: its directory does not exist; make it first")
    dtype: Literal["fp32", "bf16"] = "bf16" if compute_dtype == "bf16" else "fp32"
    options = VerifyOptions(dtype, tensors_only, tolerance, tokens, prompts, like)
    report = verify(a, b, options, Progress())
    typer.echo(report_text(report))
    if json_out is not None:
        json_out.write_text(json.dumps(report.as_json(), allow_nan=False, indent=1), encoding="utf-8")
    raise typer.Exit(0 if report.is_equal else 1)


@app.command("inspect")
def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            help="Model directory, .gguf file, Megatron checkpoint or unfinished conversion.", show_default=False
        ),
    ],
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read all weights and compare them with what was written.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print json.")] = False,
) -> None:
    """What is this, is it whole, and what is in it? Exit code 1 if it is not whole, or damaged.

    Example: `oprd convert inspect qwen72b_megatron --checksums`
    """
    from checkpoints_conversion.describe import check_checksums, describe, description_text

    found = describe(path)
    checked = check_checksums(path, Progress()) if checksums and found.problem is None else None
    if as_json:
        record = {**dataclasses.asdict(found), "checksums": checked and dataclasses.asdict(checked)}
        typer.echo(json.dumps(record, indent=1))
    else:
        typer.echo(description_text(found))
        typer.echo(checked.text() if checked else "", nl=checked is not None)
    raise typer.Exit(1 if found.problem or (checked and checked.damaged) else 0)


def _dtype(name: str | None) -> str | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype {name}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def _size(text: str) -> int:
    number = text.strip().rstrip("BbGgIiKkMm")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"--max-shard-size {text}: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB") from None
    if size < 1:
        raise UserError(f"--max-shard-size {text}: must be positive")
    return size


def _run(convert: Callable[[Progress], Summary], out: Path) -> None:
    """Run a conversion and say what it did."""
    progress = Progress()
    try:
        summary = convert(progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {out}.incomplete keeps what is finished, --resume continues", err=True)
        raise typer.Exit(130) from None
    for note in summary.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(summary_line(summary, progress))


def summary_line(summary: Summary, progress: Progress) -> str:
    """Tensors, bytes, time, rate and peak memory, in one line."""
    rate = f" at {summary.written / 2**30 / summary.seconds:.2f} GiB/s" if summary.written else ""
    return (
        f"{summary.out}: {summary.tensors} tensors, {summary.nbytes / 2**30:.2f} GiB; {summary.written / 2**30:.2f} GiB "
        f"written in {summary.seconds:.1f} s{rate}; peak memory at most {_peak_memory(progress) / 2**20:.0f} MiB"
    )


def _peak_memory(progress: Progress) -> int:
    """Bytes held at most: the sum of every process's own peak."""
    return peak_bytes() + sum(held for process, held in progress.memory.items() if process != os.getpid())


def main() -> None:
    """`python -m checkpoints_conversion`."""
    from oprd_megatron.entry import one_line_errors, quiet_libraries

    quiet_libraries()
    with one_line_errors():
        app()
    sys.exit(0)
