"""Output-space terms, schedules and recipes in the config: what they come to, and mistakes that each cost one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from oprd_megatron.cli import app
from oprd_megatron.config import RunConfig, load_config, parse_config
from oprd_megatron.config.recipes import RECIPES
from oprd_megatron.config.schedule import Schedule, is_ever_on, weight_at
from tests.config.test_config import MINIMAL, message, write

Values = dict[str, Any]
SAMPLED = {
    "name": None,
    "weight": 1.0,
    "temperature": 1.0,
    "positions": "all",
    "first_or_last": 2000,
    "kind": "sampled",
    "estimator": "policy_gradient",
}
EACH_KIND = [
    SAMPLED,
    {**SAMPLED, "kind": "topk", "k": 16, "support": "student", "rest": "renormalize"},
    {**SAMPLED, "kind": "full", "divergence": "reverse", "mixing": 0.5},
]
for _term in EACH_KIND[1:]:
    del _term["estimator"]


def with_terms(*terms: Values, **sections: Values) -> Values:
    """A minimal run with output terms, and keys of other sections."""
    values = copy.deepcopy(MINIMAL)
    for section, keys in {"output": {"terms": list(terms)}, **sections}.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def test_every_default_of_a_term() -> None:
    """A term of which only the kind is given; a changed default must be changed here on purpose."""
    kinds = [{"kind": term["kind"]} for term in EACH_KIND]
    terms = parse_config(with_terms(*kinds), "test").output.terms
    assert [term.model_dump() for term in terms] == EACH_KIND
    assert [term.label for term in terms] == ["sampled", "topk", "full"]


# fmt: off
PLACES = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0]
SCHEDULES = [
    # weights at PLACES
    (2.0,                                          [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    ([[0.3, 4.0]],                                 [4.0, 4.0, 4.0, 4.0, 4.0, 4.0]),
    ([[0, 1], [1, 0]],                             [1.0, 0.875, 0.75, 0.5, 0.25, 0.0]),
    ([[0, 0], [0.5, 0], [0.5, 1]],                 [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
    ([[0, 8], [0.25, 8], [0.25, 2], [0.75, 0]],    [8.0, 8.0, 2.0, 1.0, 0.0, 0.0]),
    ([[0.25, 3], [0.75, 5]],                       [3.0, 3.0, 3.0, 4.0, 5.0, 5.0]),
    ([[0.5, 1], [0.5, 7], [0.5, 2]],               [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]),
    ([[0, 5], [0, 1], [1, 3]],                     [1.0, 1.25, 1.5, 2.0, 2.5, 3.0]),
    ([[0, 1], [1, 1], [1, 9]],                     [1.0, 1.0, 1.0, 1.0, 1.0, 9.0]),
]
# fmt: on


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES, ids=str)
def test_weight_at(schedule: Any, expected: list[float]) -> None:
    """Constants, lines, and jumps, of which the later point counts; flat before the first point and after the last."""
    parsed = TypeAdapter(Schedule).validate_python(schedule)
    assert [weight_at(parsed, place) for place in PLACES] == expected


def test_jumps_are_jumps() -> None:
    """Just before a jump it has not happened."""
    parsed = TypeAdapter(Schedule).validate_python([[0, 0], [0.5, 0], [0.5, 1]])
    assert (weight_at(parsed, 0.5 - 1e-9), weight_at(parsed, 0.5)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([[0.5, 1], [0.2, 0]], "in order of progress; these are at [0.5, 0.2]"),
        ([[0, 1], [1.5, 0]], "less than or equal to 1"),
        ([[-0.5, 1]], "greater than or equal to 0"),
        ([[0, -1]], "greater than or equal to 0"),
        ([], "(got [])"),
        ([[0, 1, 2]], "at most 2"),
        ([[0, float("inf")]], "finite"),
        (-1, "greater than or equal to 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["distill.coefficient", "output.terms[0].weight"])
def test_schedules_that_are_refused(tmp_path: Path, key: str, schedule: Any, says: str) -> None:
    """Out of order, outside of a run, negative or empty: one line that starts with the key."""
    values = with_terms({"kind": "full", "weight": schedule} if "weight" in key else {"kind": "full"})
    if key == "distill.coefficient":
        values["distill"] = {"coefficient": schedule}
    text = message(tmp_path, [], values)
    assert text.startswith(f"{key}: ") and says in text, text


def test_is_ever_on() -> None:
    """At least one point above 0."""
    ons = [
        is_ever_on(schedule)
        for schedule in (0.0, 0.1, [(0.0, 0.0)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 0.0), (1.0, 2.0)])
    ]
    assert ons == [False, True, False, False, True]


FULL = {"kind": "full"}
TEACHERS = {"kind": "topk", "support": "teacher", "name": "theirs"}


@pytest.mark.parametrize(
    ("values", "starts", "says"),
    [
        (with_terms({"kind": "full", "kk": 3}), "output.terms[0].kk: unknown key", "known here: name, weight"),
        (with_terms({"kind": "topk", "kk": 3}), "output.terms[0].kk: unknown key; did you mean 'k'?", "support, rest"),
        (
            with_terms({"kind": "sampled"}, {"kind": "full", "divergense": "reverse"}),
            "output.terms[1].divergense: unknown key; did you mean 'divergence'?",
            "mixing",
        ),
        (
            with_terms({"kind": "full", "estimator": "k2"}),
            "output.terms[0].estimator: unknown key",
            "divergence",
        ),
        (with_terms({"k": 3}), "output.terms[0]: needs a kind; see `oprd config`", ""),
        (with_terms({"kind": "top1"}), "output.terms[0]: ", "'topk'"),
        (with_terms({"kind": "topk", "k": 0}), "output.terms[0].k: ", "greater than 0 (got 0)"),
        (with_terms({"kind": "topk", "support": "both"}), "output.terms[0].support: ", "(got 'both')"),
        (with_terms({"kind": "topk", "rest": "drop"}), "output.terms[0].rest: ", "(got 'drop')"),
        (with_terms({"kind": "sampled", "estimator": "k1"}), "output.terms[0].estimator: ", "(got 'k1')"),
        (with_terms({"kind": "full", "divergence": "js"}), "output.terms[0].divergence: ", "(got 'js')"),
        (with_terms({"kind": "full", "mixing": 1}), "output.terms[0].mixing: ", "less than 1 (got 1)"),
        (with_terms({"kind": "full", "temperature": 0}), "output.terms[0].temperature: ", "greater than 0 (got 0)"),
        (with_terms({"kind": "full", "positions": "even"}), "output.terms[0].positions: ", "(got 'even')"),
        (with_terms({"kind": "full", "first_or_last": 0}), "output.terms[0].first_or_last: ", "greater than 0 (got 0)"),
        (with_terms(FULL, output={"terms": {"kind": "full"}}), "output.terms: ", "valid list"),
        (with_terms({"kind": "topk", "k": 1}), "output.terms[0]: k: 1 renormalised is identically zero", "kind: sampled"),
        (with_terms({"kind": "full", "weight": 0}), "output.terms[0]: the term full can give no gradient", "leave the"),
        (
            with_terms({"kind": "full", "name": "exact", "weight": [[0, 0], [1, 0]]}),
            "output.terms[0]: the term exact can give no gradient: its weight is 0 throughout",
            "",
        ),
        (with_terms({"kind": "full", "name": "oprd"}), "output: terms: oprd is what the metrics call", "another name"),
        (with_terms(FULL, FULL), "output: terms: two are called full; give them different names", ""),
        (
            with_terms(FULL, {"kind": "topk", "name": "full"}),
            "output: terms: two are called full; give them different names",
            "",
        ),
        (
            with_terms({"kind": "sampled"}, FULL, output={"terms": [{"kind": "sampled"}, FULL], "teacher_head": "teacher"}),
            "output: teacher_head: teacher cannot serve the term full",
            "use auto or student",
        ),
        (
            with_terms(output={"terms": [{"kind": "topk", "name": "mine"}], "teacher_head": "teacher"}),
            "output: teacher_head: teacher cannot serve the term mine",
            "",
        ),
        (
            with_terms(FULL, distill={"cross_tokenizer": True}),
            "output.terms: full needs one vocabulary, but distill.cross_tokenizer is true",
            "leave the terms out",
        ),
        (
            with_terms({"kind": "sampled", "temperature": 2}),
            "output.terms: sampled is measured on tokens drawn at rollout.temperature 1, but its own temperature is 2",
            "make them equal",
        ),
        (
            with_terms({"kind": "sampled"}, rollout={"temperature": 0.6}),
            "output.terms: sampled is measured on tokens drawn at rollout.temperature 0.6, but its own temperature is 1",
            "",
        ),
        (
            with_terms({"kind": "sampled"}, {"kind": "sampled", "name": "second", "temperature": 0.5}),
            "output.terms: second is measured on tokens drawn at rollout.temperature 1, but its own temperature is 0.5",
            "",
        ),
        ({**MINIMAL, "distill": {"coefficient": 0}}, "there is nothing to train on", "output.terms is empty"),
        ({**MINIMAL, "distill": {"coefficient": [[0, 0], [1, 0]]}}, "there is nothing to train on", ""),
        ({**MINIMAL, "distill": {"mode": "none"}}, "there is nothing to train on", "set one of them"),
        (
            {**MINIMAL, "distill": {"mode": "none", "bridge": "b"}},
            "distill: mode: none uses no bridge",
            "leave distill.bridge out",
        ),
        ({**MINIMAL, "distill": {"opd_coefficient": 1}}, "distill.opd_coefficient: unknown key", "coefficient"),
    ],
)  # fmt: skip
def test_terms_that_are_refused(tmp_path: Path, values: Values, starts: str, says: str) -> None:
    """Each mistake in a term is one line that starts with its place in the list."""
    text = message(tmp_path, [], values)
    assert text.startswith(starts) and says in text, text


@pytest.mark.parametrize(
    "values",
    [
        with_terms({"kind": "topk", "k": 1, "rest": "tail"}),
        with_terms(FULL, {"kind": "full", "name": "other"}),
        with_terms(output={"terms": [{"kind": "sampled"}, TEACHERS], "teacher_head": "teacher"}),
        with_terms({"kind": "sampled", "temperature": 0.6}, rollout={"temperature": 0.6}),
        with_terms({"kind": "full", "temperature": 2}, {"kind": "topk", "temperature": 3}),
        with_terms(FULL, distill={"mode": "none"}),
        with_terms(FULL, distill={"coefficient": 0}),
        with_terms({"kind": "full", "weight": [[0, 0], [1, 1]]}, distill={"coefficient": 0}),
    ],
)
def test_terms_that_agree_pass(values: Values) -> None:
    """The other side of each refusal."""
    parse_config(values, "test")


ON = [(0.0, 100.0), (0.5, 100.0), (0.5, 0.0)]
TOP_16 = {"kind": "topk", "k": 16, "support": "student", "rest": "renormalize"}
PLAIN = {"mode": "identity", "normalize": "none", "positions": "last_k", "k": 2000, "coefficient": 1.0}
PROMISED: dict[str, tuple[Values, list[Values]]] = {
    # what a recipe's comment promises: (distill, output.terms)
    "oprd_vanilla": (PLAIN, []),
    "oprd_bridge": ({"normalize": "l2", "positions": "last_k", "k": 2000, "coefficient": 100.0}, []),
    "opd_sampled": ({"mode": "none"}, [{"kind": "sampled", "estimator": "policy_gradient"}]),
    "opd_topk": ({"mode": "none"}, [TOP_16]),
    "opd_full": ({"mode": "none"}, [{"kind": "full", "divergence": "reverse"}]),
    "oprd_plus_opd": (PLAIN, [TOP_16]),
    "two_stage": (
        {"normalize": "l2", "positions": "last_k", "k": 2000, "coefficient": ON},
        [{"kind": "full", "divergence": "reverse", "weight": [[0.5, 0], [0.5, 1]]}],
    ),
}


def of_file(recipe: str) -> Values:
    """The smallest file that names the recipe."""
    needs_bridge = PROMISED[recipe][0].get("normalize") == "l2"
    return {**copy.deepcopy(MINIMAL), "recipe": recipe, **({"distill": {"bridge": "b"}} if needs_bridge else {})}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_what_they_promise(recipe: str) -> None:
    """A file with a recipe is the same run as one with the settings written out; the rest is defaults."""
    distill, terms = PROMISED[recipe]
    bridge = {"bridge": "b", "mode": "low_rank"} if distill.get("normalize") == "l2" else {}
    written = {**MINIMAL, "distill": {**distill, **bridge}, "output": {"terms": terms}}
    assert parse_config(of_file(recipe), "test") == parse_config(written, "test")
    assert parse_config(of_file(recipe), "test").optimizer.lr == 1e-5


def test_every_recipe_is_checked_here() -> None:
    """None is forgotten."""
    assert list(PROMISED) == list(RECIPES)


def test_the_two_stages_do_not_overlap() -> None:
    """At every step exactly one of two_stage's losses is on."""
    config = parse_config(of_file("two_stage"), "test")
    for step in range(9):
        weights = [
            weight_at(schedule, step / 8) for schedule in (config.distill.coefficient, config.output.terms[0].weight)
        ]
        assert weights == ([100.0, 0.0] if step < 4 else [0.0, 1.0])


def test_the_file_goes_before_its_recipe(tmp_path: Path) -> None:
    """Sections are filled in key by key; a list of terms is taken whole; null leaves a key to the recipe; and a recipe may come
    from the command line. Recipes are not changed by what a run does to them."""
    before = copy.deepcopy(RECIPES)
    values = {
        **MINIMAL,
        "recipe": "oprd_plus_opd",
        "distill": {"coefficient": 10, "k": None},
        "optimizer": {"lr": 1e-4},
    }
    config = parse_config(values, "test")
    assert (config.distill.coefficient, config.distill.k, config.distill.normalize) == (10.0, 2000, "none")
    assert config.output.terms[0].kind == "topk" and config.optimizer.lr == 1e-4
    mine = parse_config({**values, "output": {"terms": [FULL], "chunk_tokens": 8}}, "test").output
    assert [term.kind for term in mine.terms] == ["full"] and mine.chunk_tokens == 8
    head = parse_config({**values, "output": {"chunk_tokens": 8}}, "test").output
    assert [term.kind for term in head.terms] == ["topk"] and head.chunk_tokens == 8
    path = write(tmp_path, MINIMAL)
    assert load_config(path, ["recipe=opd_full", "distill.mode=identity"]).distill.mode == "identity"
    assert before == RECIPES and values["distill"] == {"coefficient": 10, "k": None}


@pytest.mark.parametrize(("recipe", "near"), [("opd-full", "opd_full"), ("vanilla", "oprd_vanilla"), (3, "")])
def test_a_recipe_that_is_not_there(tmp_path: Path, recipe: Any, near: str) -> None:
    """One line with the nearest name and all there are."""
    text = message(tmp_path, [], {**MINIMAL, "recipe": recipe})
    assert text.startswith(f"recipe: no {recipe!r}; did you mean '{near}") and "two_stage" in text


def test_recipes_have_no_keys_of_their_own(tmp_path: Path) -> None:
    """A mistake in what a recipe fills in is named like any other."""
    assert message(tmp_path, ["recipe=oprd_bridge", "distill.modes=x"]).startswith(
        "distill.modes: unknown key; did you mean 'mode'"
    )


def shown(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["config", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_oprd_config_prints_a_run(tmp_path: Path, recipe: str) -> None:
    """What it prints is a config file that names no recipe and loads to the same run."""
    path = write(tmp_path, of_file(recipe))
    text = shown(path, "run.steps=7")
    (tmp_path / "printed.yaml").write_text(text)
    assert "recipe" not in yaml.safe_load(text)
    printed = load_config(tmp_path / "printed.yaml")
    assert printed == load_config(path, ["run.steps=7"]) and printed.run.steps == 7


def test_oprd_config_takes_a_recipe_from_the_command_line(tmp_path: Path) -> None:
    """`oprd config FILE recipe=..` is the same as the recipe in the file."""
    path = write(tmp_path, MINIMAL)
    printed = RunConfig.model_validate(yaml.safe_load(shown(path, "recipe=opd_topk")))
    assert printed == parse_config(of_file("opd_topk"), "test")


def test_oprd_config_lists_recipes_and_kinds() -> None:
    """Without a file: every recipe by name, and each kind of a term with its own keys."""
    text = shown()
    assert text.startswith(f"recipe: {' | '.join(RECIPES)}")
    for line in (
        "output.terms: list of sampled | topk | full = []",
        "# output.terms[], kind: topk: ",
        "output.terms[].mixing: ",
    ):
        assert line in text
