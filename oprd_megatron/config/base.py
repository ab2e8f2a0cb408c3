"""What every section of a run's description is made of."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Strict(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen, docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type holds: one, several that its `kind` tells apart, or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for member in get_args(annotation) for section in sections_in(member)]


def kind_of(section: type[BaseModel]) -> str:
    """What a section's `kind` has to be."""
    return str(get_args(section.model_fields["kind"].annotation)[0])
