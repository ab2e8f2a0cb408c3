"""`precision` in the config: what goes together, and mistakes that each cost one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.errors import ConfigError
from tests.config.test_config import MINIMAL

Values = dict[str, Any]


def with_precision(model: str, precision: Values, **keys: Any) -> Values:
    """A minimal run with this precision of one model, and other keys of it."""
    values = copy.deepcopy(MINIMAL)
    values[model] = {**values[model], "precision": precision, **keys}
    return values


def test_what_is_left_out() -> None:
    """A model without the section is as it was: nothing in fp8, no padding of tokens."""
    precision = parse_config(MINIMAL, "test").teacher.precision
    assert not precision.is_quantised and precision.token_multiple == 1


@pytest.mark.parametrize(
    ("precision", "multiple"),
    [
        ({"linear": "weight_only"}, 1),
        ({"linear": "fp8"}, 16),
        ({"linear": "fp8", "recipe": "blockwise"}, 16),
        ({"linear": "fp8", "recipe": "mxfp8"}, 32),
    ],
)
def test_token_multiple(precision: Values, multiple: int) -> None:
    """Tokens of a pack are filled up for products in fp8, and only for those."""
    assert parse_config(with_precision("teacher", precision), "test").teacher.precision.token_multiple == multiple


@pytest.mark.parametrize(
    ("model", "precision", "keys", "said"),
    [
        ("teacher", {"recipe": "blockwise"}, {}, "teacher.precision: recipe: is for linear: fp8, not dtype"),
        ("teacher", {"linear": "weight_only", "recipe": "mxfp8"}, {}, "recipe: is for linear: fp8, not weight_only"),
        ("teacher", {"linear": "weight_only", "fp8_parameters": True}, {}, "fp8_parameters: is for linear: fp8"),
        ("teacher", {"keep_layers": [1]}, {}, "are for linear: fp8 or weight_only"),
        ("teacher", {"noise": "measure"}, {}, "are for linear: fp8 or weight_only"),
        ("student", {"linear": "fp8", "recipe": "delayed", "first_layers": 1}, {}, "delayed needs every layer in fp8"),
        ("student", {"linear": "fp8", "recipe": "delayed", "last_layers": 1}, {}, "delayed needs every layer in fp8"),
        ("student", {"linear": "fp8", "recipe": "delayed", "keep_layers": [2]}, {}, "delayed needs every layer in fp8"),
        ("teacher", {"linear": "fp8", "recipe": "delayed"}, {}, "delayed never updates the scales"),
        ("teacher", {"linear": "weight_only", "keep_worst": 2}, {}, "keep_worst: needs to know which layers"),
        ("teacher", {"linear": "fp8"}, {"dtype": "fp32"}, "computes all else in bf16, but dtype is fp32"),
        ("student", {"linear": "weight_only"}, {}, "weight_only is for a frozen teacher"),
        ("student", {"linear": "fp8", "fp8_parameters": True}, {}, "the student trains bf16 parameters"),
        ("student", {"linear": "fp8", "noise": "measure"}, {}, "precision.noise: is for a frozen teacher"),
        ("teacher", {"linear": "weight_only"}, {"ema_decay": 0.9}, "would stand still"),
        ("teacher", {"linear": "weight_only", "keep_layers": [0]}, {}, "keep_layers"),
        ("teacher", {"linear": "int8"}, {}, "teacher.precision.linear"),
    ],
)
def test_a_mistake_costs_one_line(model: str, precision: Values, keys: Values, said: str) -> None:
    """What does not go together is refused when the config is read."""
    with pytest.raises(ConfigError) as caught:
        parse_config(with_precision(model, precision, **keys), "test")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_in_fp8_does_not_take_turns() -> None:
    """Of several teachers that wait in host memory none may be Transformer Engine's; weights alone in fp8 may."""

    def run(linear: str) -> Values:
        values = {key: section for key, section in copy.deepcopy(MINIMAL).items() if key != "teacher"}
        teachers = [{"name": name, "path": name, "precision": {"linear": linear}} for name in ("a", "b")]
        return {**values, "teachers": teachers, "teaching": {"by": "sample", "host_budget": "1GiB"}}

    parse_config(run("weight_only"), "test")
    with pytest.raises(ConfigError, match="cannot wait in host memory"):
        parse_config(run("fp8"), "test")
