"""The config's own documentation, from the docstrings in `schema`."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from oprd_megatron.config.base import kind_of, sections_in
from oprd_megatron.config.recipes import RECIPES
from oprd_megatron.config.schema import RunConfig


def describe_config() -> str:
    """Every key, one paragraph each: `section.key: type = default`, then what it means."""
    text = "Settings to start from; what the file says itself goes first. `oprd config FILE` prints what they come to."
    return "\n".join([f"recipe: {' | '.join(RECIPES)}\n    {text}", *_lines(RunConfig, "")])


def _lines(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        nested = sections_in(field.annotation)
        text = " ".join((field.description or "").split())
        if len(nested) == 1 and prefix.endswith("[]."):
            there = name if name in RunConfig.model_fields else f"teacher.{name}"
            lines.append(f"{prefix}{name}: as {there}\n    {text}")
        elif len(nested) == 1 and get_origin(field.annotation) is list:
            lines += ["", f"# {prefix}{name}[]: {text}", *_lines(nested[0], f"{prefix}{name}[].")]
        elif len(nested) == 1:
            lines += ["", f"# {prefix}{name}: {text}", *_lines(nested[0], f"{prefix}{name}.")]
        elif nested:
            lines += [f"{prefix}{name}: list of {' | '.join(map(kind_of, nested))} = []\n    {text}"]
            for kind in nested:
                title = f"# {prefix}{name}[], kind: {kind_of(kind)}: {' '.join((kind.__doc__ or '').split())}"
                lines += ["", title, *_lines(kind, f"{prefix}{name}[].")]
            lines.append("")
        else:
            default = "" if field.default is PydanticUndefined else f" = {_shown(field.default)}"
            lines.append(f"{prefix}{name}: {_type(field.annotation)}{default}\n    {text}")
    return lines


def _type(annotation: Any) -> str:
    """A type as a person would write it: `int | null`, `all | last | list of int`."""
    if annotation is NoneType:
        return "null"
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(members[0])
    if origin is Literal:
        return " | ".join(map(str, members))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, members))
    if origin in (list, tuple):
        return f"list of {_type(members[0])}"
    if origin is dict:
        return f"{{{_type(members[0])}: {_type(members[1])}}}"
    return {Path: "path", ByteSize: "bytes"}.get(annotation, annotation.__name__)


def _shown(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return repr(value)
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
