#!/usr/bin/env python
"""What an actor update costs, in time and memory: OPRD against OPD on the same fixed rollouts, written well and as usual.

    python tools/bench_update.py                     1.5B-shaped slice and small sweeps on this machine, minutes
    python tools/bench_update.py --shape paper       the paper's shape, for a GPU: 28 layers, 8 x 16,384 tokens, bf16, AdamW
    python tools/bench_update.py --rollouts r.jsonl  lengths and ids that `oprd rollout` recorded

All arms meet the same random models and the same packed micro-batches, through the same mcore schedule, with one forward of
each model:

    oprd       is ours: Eq. 6 on every layer at the last k response positions, injected where the layer lives; no LM head runs.
    opd-*      is ours: sampled, top-16 (student's support, renormalised) or full reverse KL. Logits of a few tokens exist at a
               time, and the head's gradient exists once, as backward scales in place what forward left.
    dense-*    is the same losses as they are commonly written: logits [tokens, V] of both models for a micro-batch,
               log_softmax in fp32, autograd.
    release    is OPRD as the authors' code does it: full-length states of every layer of both models are cast to fp32 and
               stacked before the last k positions are selected. Both LM heads run, and their logits are dropped.

The update is everything after the teacher's forward: student forward, loss, backward (for opd-* also what it needs of the
teacher's head, which the dense arms run in the teacher's forward). Memory is the most that is held at a time in the update,
ABOVE what is resident: both models' weights, gradient buffers, and the optimizer's state where there is one. What the teacher's
forward left for the update counts. The optimizer's step is the same for all arms and is timed apart. An untied head has a
gradient buffer in every arm, though a run of OPRD alone would freeze it and have none.

On CPU every allocation and release of torch's allocator is read from its profiler. Beside it stands the rise of the process's
peak resident set; glibc is told to give back blocks above 1 MiB at once, else freed activations would count. On a GPU it is the
allocator's own peak. On CPU, seconds are those that this process computed, so that others on the machine do not count; the
clock's stand beside them. Each case has a process of its own, in which arms take turns, round after round. Times are medians,
and ratios are of the same round, with their smallest and largest. Arms that compute the same thing (opd-x and dense-x, oprd and
release) are checked to agree in loss and gradient norm. The code is in `tools/update_bench/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from update_bench.case import SHAPES, Case, refuse, sweep
from update_bench.report import judge, notes, plot, table
from update_bench.run import run_cases

from oprd_megatron.entry import one_line_errors
from oprd_megatron.errors import UserError

SHAPE_HELP = """slice: two layers of Qwen2-1.5B (d 1536, V 151,936) on 2,048 tokens, then sweeps around a smaller model.
paper: all 28 layers, 8 x 16,384 tokens, bf16, with AdamW's state, for a GPU; what does not fit is left out. tiny: seconds, to
see it work."""
ROLLOUTS_HELP = "jsonl of `oprd rollout`, cut to --responses and --response-tokens; no sweeps then."
OPTIMIZER_HELP = "AdamW's state in the resident baseline, its step timed apart."


def main(
    shape: Annotated[str, typer.Option(help=SHAPE_HELP)] = "slice",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of both models.")] = None,
    width: Annotated[int | None, typer.Option(min=32, help="Hidden size; heads and FFN follow in proportion.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary size.")] = None,
    response_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a response.")] = None,
    responses: Annotated[int | None, typer.Option(min=1, help="Responses in the batch; one is one micro-batch.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="OPRD supervises the last k response tokens; 2000.")] = None,
    tied: Annotated[bool | None, typer.Option("--tied/--untied", help="Head and embedding share their weight.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16, of both models.")] = None,
    optimizer: Annotated[bool | None, typer.Option(help=OPTIMIZER_HELP)] = None,
    recompute: Annotated[str | None, typer.Option(help="Of the student's activations: none, selective or full.")] = None,
    terms: Annotated[str | None, typer.Option(help="Losses of opd and dense, with commas: topk,sampled,full.")] = None,
    rollouts: Annotated[Path | None, typer.Option(help=ROLLOUTS_HELP)] = None,
    sweeps: Annotated[bool, typer.Option(help="Also vary length, width and vocabulary.")] = True,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns that every arm gets.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="Directory for update.json, update.md and update.png.")
    ] = Path("runs/bench_update"),
) -> None:  # fmt: skip
    """Time and peak memory of the actor update: OPRD and OPD as built here, OPD with dense logits, OPRD as released.

    The same fixed rollouts, the same models, one forward of each. Memory is what the update holds above weights, gradient
    buffers and optimizer state. The first case of the slice is judged by bars that are printed with pass or MISS. Example:

    python tools/bench_update.py --shape slice --response-tokens 1024 --no-sweeps --terms topk,full
    """
    with one_line_errors():
        given = {
            "layers": layers, "width": width, "vocab": vocab, "response": response_tokens, "responses": responses, "k": k,
            "tied": tied, "dtype": dtype, "optimizer": optimizer, "rollouts": rollouts, "rounds": rounds, "device": device,
            "recompute": recompute,
            "terms": tuple(terms.split(",")) if terms is not None else None,
        }  # fmt: skip
        cases = choose(shape, {name: value for name, value in given.items() if value is not None}, sweeps)
        out.mkdir(parents=True, exist_ok=True)
        results = run_cases(cases)
    report(results, shape, out)


def choose(shape: str, given: dict[str, Any], sweeps: bool) -> list[Case]:
    """The shape as the user's options change it, then its sweeps.

    Raises:
        UserError: an option has a value that there is not, or a case cannot work here.
    """
    allowed_of = {"shape": tuple(SHAPES), "dtype": ("fp32", "bf16"), "device": ("auto", "cpu", "cuda"),
                  "recompute": ("none", "selective", "full")}  # fmt: skip
    for option, allowed in allowed_of.items():
        if (value := {"shape": shape, "dtype": "fp32", "recompute": "none", **given}[option]) not in allowed:
            raise UserError(f"--{option} {value}: choose of {', '.join(allowed)}")
    headline = replace(SHAPES[shape], **given)
    cases = [headline, *(sweep(shape, headline) if sweeps and "rollouts" not in given else [])]
    for case in cases:
        refuse(case)
    return cases


def report(results: list[dict[str, Any]], shape: str, out: Path) -> None:
    """Write the figures as json, markdown and a plot, and print the markdown."""
    (out / "update.json").write_text(json.dumps({"cases": results, "bars": judge(results[0])}, indent=1))
    text = f"{table(results)}\n\n{notes(results, shape)}\n"
    (out / "update.md").write_text(text)
    plot(results, out / "update.png")
    typer.echo(f"{text}\nwritten: {out}/update.json, update.md, update.png")


if __name__ == "__main__":
    typer.run(main)
