"""From a YAML file and `key.sub=value` overrides to a checked `RunConfig`; every mistake is one line that names the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from oprd_megatron.config.base import kind_of, sections_in
from oprd_megatron.config.recipes import expand
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number: YAML 1.1, which PyYAML follows, wants 1.0e-5."""


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML, apply overrides, check everything.

    Args:
        path: YAML file.
        overrides: `key.sub=value`; the value is YAML, so `optimizer.lr=2e-4`, `distill.layers=[1,2]` and `eval=null` work.

    Raises:
        ConfigError: one line that names the file or key.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; give the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror}); give the path of a YAML file") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"{where}: not valid YAML ({' '.join(str(getattr(error, 'problem', error)).split())})"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections (run, teacher, student, rollout, ..)")
    return parse_config(with_overrides(values, overrides), str(path))


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with `key.sub=value` set, in place.

    Raises:
        ConfigError: one of them is not of that form, or its value is not YAML.
    """
    for override in overrides:
        _apply(values, override)
    return values


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """Check a nested dict, after its recipe is filled in; `source` is named in errors."""
    values = expand(values, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None


def _one_line(error: ValidationError) -> str:
    """The first mistake, with an unknown key's nearest neighbour.

    A union (`layers: all | [1, 2]`) reports one error per member under a location that ends in the member's name: those
    tails are not keys of the config and are cut.
    """
    errors = error.errors()
    unknown = next((item for item in errors if item["type"] == "extra_forbidden"), None)
    same = [item for item in errors if _locate(item["loc"]) == _locate(errors[0]["loc"])]
    # Among the members of a union the one that was meant got furthest, or reads well and says what else is wrong.
    first = unknown or max(same, key=lambda item: (len(item["loc"]), item["type"] == "value_error"))
    location, known = _locate(first["loc"])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        return f"{key}: unknown key; did you mean {near[0]!r}? (known here: {', '.join(known)})"
    if first["type"] == "missing":
        return f"{key}: required, but not given"
    if first["type"] == "union_tag_not_found":
        return f"{key}: needs a kind; see `oprd config`"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
    return f"{key}: {message}{shown}" if key else message


def _locate(loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """(the leading part of a pydantic location that names config keys, keys that are known beside the last of them)."""
    keys: list[str] = []
    sections: list[type[BaseModel]] = [RunConfig]
    known: list[str] = []
    for item in loc:
        if not sections:
            break
        if isinstance(item, int):  # of a list of sections
            keys[-1] += f"[{item}]"
        elif len(sections) > 1:  # pydantic names which of them it is
            sections = [section for section in sections if kind_of(section) == item]
        else:
            keys.append(item)
            known = list(sections[0].model_fields)
            sections = sections_in(sections[0].model_fields[item].annotation) if item in known else []
    return keys, known
