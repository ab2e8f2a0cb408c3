"""`oprd eval`: how far a student is from its teacher, and how many problems it solves."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oprd_megatron.commands.default import default_command
from oprd_megatron.entry import refuse_existing
from oprd_megatron.errors import ConfigError, UserError

if TYPE_CHECKING:
    from oprd_megatron.config.benchmark import BenchmarkConfig

HELD_OUT = "held-out"

app = typer.Typer(
    cls=default_command(HELD_OUT),
    no_args_is_help=True,
    help="""Score a student: on held-out text against its teacher, or on problems whose answers are known.

`oprd eval RUN.yaml --weights runs/x` measures KL(teacher || student), cross-entropy and cosine per layer. `oprd eval run
RUN.yaml --file aime24.json --out before` asks problems several times each and grades the answers (Avg@k, Best@k, pass@j,
majority@k, Dist-4g, length); the same with `--weights runs/x --out after`, then `oprd eval compare before after`. Grading needs
math-verify: `pip install 'oprd-megatron[eval]'`.""",
)

Config = Annotated[
    Path, typer.Argument(help="YAML file of the run. `oprd config` lists every key.", show_default=False)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.sub=value, as many as you like; values are YAML.", show_default=False)
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The student: a checkpoint (iter_..), a run directory (its newest), or a Hugging Face directory; left out, "
        "student.path.",
        show_default=False,
    ),
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        help="Problems: .jsonl, .json or .parquet; give it again for more. Its name is the benchmark's.",
        show_default=False,
    ),
]
ProblemField = Annotated[
    str | None, typer.Option(help="Field with the problem; left out, problem, question or prompt.")
]
AnswerField = Annotated[
    str | None,
    typer.Option(
        help="Field with the right answer, a.b for b in a; left out, answer, reward_model.ground_truth, solution."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many problems of each file.")]
SkipUnparsable = Annotated[bool, typer.Option("--skip-unparsable", help="Leave out right answers that cannot be read.")]
BoxedOnly = Annotated[
    bool, typer.Option("--boxed-only", help="Only a \\boxed answer counts; else the last expression does without one.")
]
Seconds = Annotated[float | None, typer.Option(help="Time to read and compare one answer; left out, 5.")]
Template = Annotated[
    str | None, typer.Option(help="What is asked; {problem} is the problem. Left out, it is told to box its answer.")
]


@app.command(HELD_OUT)
def held_out(
    config: Config,
    overrides: Overrides = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Also write the figures as json.")] = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", min=1, help="Ranks on this machine; left out, as many as the layouts name."),
    ] = None,
) -> None:
    """Score a student on held-out prompts: KL(teacher || student), cross-entropy and cosine per layer.

    Without --weights the student of the config is scored as it is, untrained. The word `held-out` may be left out.

    Example: `oprd eval examples/quickstart.yaml --weights runs/quickstart`
    """
    from oprd_megatron.config import load_config
    from oprd_megatron.evaluation.comparison import eval_table
    from oprd_megatron.launching.ranks import default_num_ranks, launch
    from oprd_megatron.saving.export import checkpoint_of

    run = load_config(config, overrides or [])
    refuse_existing(out)
    checkpoint = checkpoint_of(weights) if weights else None
    arguments = [str(checkpoint)] if checkpoint else []
    settings = [f"student.path={weights}"] if weights and not checkpoint else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "eval.json")
        ranks = nproc or default_num_ranks(run)
        code = launch(
            "oprd_megatron.evaluate", [str(config), str(result), *arguments, "--", *(overrides or []), *settings], ranks
        )
        if code:
            raise typer.Exit(code)
        record = json.loads(result.read_text())
    typer.echo(eval_table(record))
    if out is not None:
        out.write_text(json.dumps(record, indent=1))


@app.command()
def run(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder to write; one that was not finished is gone on with.")],
    overrides: Overrides = None,
    file: Files = None,
    weights: Weights = None,
    samples: Annotated[
        int | None, typer.Option("-k", "--samples", help="Answers to each problem; left out, 16.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Left out, 0.7; 0 is greedy, with -k 1.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Left out, 1.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Answers are cut there; left out, rollout.max_response_tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling; left out, 0.")] = None,
    template: Template = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(help="Wrap questions in the tokenizer's chat template, as is done unless told otherwise."),
    ] = None,
    limit: Limit = None,
    problem_field: ProblemField = None,
    answer_field: AnswerField = None,
    skip_unparsable: SkipUnparsable = False,
    boxed_only: BoxedOnly = False,
    answer_seconds: Seconds = None,
) -> None:
    """Ask every problem k times by the run's engine, in this process, and grade: OUT/summary.json, problems.csv, answers.csv,
    pass.png, and every response in responses.jsonl. Killed, it goes on where it was: start the same command again.

    Example: `oprd eval run run.yaml --file aime24.json --file aime25.json -k 16 --max-tokens 16384 --out before`
    """
    from oprd_megatron.benchmarks.folder import summary_text
    from oprd_megatron.benchmarks.standalone import benchmark_student
    from oprd_megatron.config import load_config

    loaded = load_config(config, overrides or [])
    settings = _settings(
        loaded.benchmark, files=file, samples=samples, temperature=temperature, top_p=top_p, max_response_tokens=max_tokens,
        seed=seed,
        template=template, chat_template=chat_template, limit=limit, problem_field=problem_field, answer_field=answer_field,
        skip_unparsable=skip_unparsable or None, boxed_only=boxed_only or None, answer_seconds=answer_seconds,
    )  # fmt: skip
    summary = benchmark_student(loaded, settings, weights or loaded.student.path, out)
    typer.echo(summary_text(summary))
    typer.echo(f"in {out}")


@app.command()
def grade(
    rollouts: Annotated[
        Path, typer.Argument(help="What `oprd rollout` wrote, or responses.jsonl of a benchmark.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    file: Files = None,
    template: Template = None,
    limit: Limit = None,
    problem_field: ProblemField = None,
    answer_field: AnswerField = None,
    skip_unparsable: SkipUnparsable = False,
    boxed_only: BoxedOnly = False,
    answer_seconds: Seconds = None,
) -> None:
    """Grade recorded responses, without a model. Each belongs to the problem whose text its prompt is.

    Example: `oprd eval grade rollouts.parquet --file dapo-math-17k.parquet --out graded`
    """
    from oprd_megatron.benchmarks.folder import summary_text
    from oprd_megatron.benchmarks.grading import Grader
    from oprd_megatron.benchmarks.recorded import grade_recorded
    from oprd_megatron.benchmarks.run import load_benchmark

    if out.exists():
        raise UserError(f"{out}: exists already; nothing is overwritten, give another --out")
    settings = _settings(
        None, files=file, template=template, limit=limit, problem_field=problem_field, answer_field=answer_field,
        skip_unparsable=skip_unparsable or None, boxed_only=boxed_only or None, answer_seconds=answer_seconds,
    )  # fmt: skip
    with Grader(settings.answer_seconds) as grader:
        problems = load_benchmark(settings, grader)
        summary = grade_recorded(rollouts, problems, settings.template, settings.boxed_only, out, grader)
    typer.echo(summary_text(summary))
    typer.echo(f"in {out}")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Folder of a benchmark.", show_default=False)],
    after: Annotated[
        Path, typer.Argument(help="Folder of another checkpoint on the same problems.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Also write comparison.json, .csv and .png into this folder.")
    ] = None,
) -> None:
    """Put two checkpoints side by side: difference of every measure, its 95 % interval (paired bootstrap over problems), its
    p-value (paired permutation test), and the problems that differ most.

    Example: `oprd eval compare before after --out compared`
    """
    from oprd_megatron.benchmarks.compare import compare as compared
    from oprd_megatron.benchmarks.compare import comparison_text, write_comparison

    found = compared(before, after)
    typer.echo(comparison_text(found))
    if out is not None:
        write_comparison(found, out)
        typer.echo(f"in {out}")


def _settings(section: BenchmarkConfig | None, **given: Any) -> BenchmarkConfig:
    """The settings of a command line; what was left out (None) is as the run's section or else `BenchmarkConfig` has it.

    Raises:
        ConfigError: there are no files, a value is out of range, or some do not go together.
    """
    from pydantic import ValidationError

    from oprd_megatron.config.benchmark import BenchmarkConfig

    values = {**(section.model_dump() if section else {}), **{key: of for key, of in given.items() if of is not None}}
    if "files" not in values:
        raise ConfigError("--file: there is no benchmark; name a file of problems")
    try:
        return BenchmarkConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {message}" if where else message) from None
