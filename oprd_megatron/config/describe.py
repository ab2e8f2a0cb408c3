"""The config's own documentation, from the docstrings in `schema`."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic_core import PydanticUndefined

from oprd_megatron.config.schema import RunConfig


def describe_config() -> str:
    """Every key, one paragraph each: `section.key: type = default`, then what it means."""
    return "\n".join(_lines(RunConfig, ""))


def _lines(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        members = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)
        text = " ".join((field.description or "").split())
        if nested is not None:
            lines += ["", f"# {prefix}{name}: {text}", *_lines(nested, f"{prefix}{name}.")]
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
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
