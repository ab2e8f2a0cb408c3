"""In which numbers a model's linear layers are kept and computed. Which combination works where is checked in
parallel/precision.py, which also turns it into mcore's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from oprd_megatron.config.base import Strict

Recipe = Literal["tensorwise", "blockwise", "delayed", "mxfp8"]
Count = Annotated[int, Field(ge=0)]


class PrecisionConfig(Strict):
    """The linear layers of the transformer blocks. Embedding, head, norms, attention and hidden states stay in `dtype`."""

    linear: Literal["dtype", "fp8", "weight_only"] = "dtype"
    """dtype: as everything else. fp8: Transformer Engine computes them in fp8, on GPUs of compute capability 9.0 or more.
    weight_only (teacher): weights are stored in fp8 and computed with in `dtype`, on any device: half the memory, no speed."""
    recipe: Recipe = "tensorwise"
    """fp8 only: how scales are found. tensorwise: one for each tensor, from its values; blockwise: one for each block; delayed:
    one for each tensor, from earlier steps (student only); mxfp8: one for 32 values (compute capability 10.0 or more)."""
    fp8_parameters: bool | None = None
    """fp8 only: weights are held in fp8 alone, not in `dtype`. Left out: the teacher's are, the student's are not."""
    first_layers: Count = 0
    """So many first layers stay in `dtype`."""
    last_layers: Count = 0
    """So many last layers stay in `dtype`."""
    keep_layers: list[PositiveInt] = []  # noqa: RUF012 (pydantic copies it)
    """These layers stay in `dtype` (1-based)."""
    keep_worst: Count = 0
    """Of the layers that `noise` names a file about, so many stay in `dtype`: those that add the most noise of their own."""
    noise: Literal["off", "measure"] | Path = "off"
    """Teacher: whether training warns of layers where rounding is more than a tenth of the student's distance. measure: the
    noise is measured before the first step, which loads the teacher in `dtype` once; a path: what
    `oprd doctor --precision --out PATH` measured."""

    @property
    def is_quantised(self) -> bool:
        """Whether any linear layer may be in fp8."""
        return self.linear != "dtype"

    @property
    def noise_file(self) -> Path | None:
        """What the doctor wrote, if `noise` names it."""
        return self.noise if isinstance(self.noise, Path) else None

    @property
    def keeps_layers(self) -> bool:
        """Whether some layers are named to stay in `dtype`."""
        return bool(self.first_layers or self.last_layers or self.keep_layers or self.keep_worst)

    @property
    def token_multiple(self) -> int:
        """What the tokens of a rank have to be a multiple of, so that matrices of fp8 can be multiplied."""
        if self.linear != "fp8":
            return 1
        return 32 if self.recipe == "mxfp8" else 16

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        if self.linear != "fp8":
            for key in ("recipe", "fp8_parameters"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: is for linear: fp8, not {self.linear}; leave it out or set linear: fp8")
        if not self.is_quantised and (self.keeps_layers or self.noise != "off"):
            raise ValueError(
                "keeping layers in dtype and noise are for linear: fp8 or weight_only; leave them out or set linear"
            )
        if self.recipe == "delayed" and self.keeps_layers:
            raise ValueError(
                "recipe: delayed needs every layer in fp8 (its scales are brought up to date where the model's last fp8 layer "
                "ends); keep no layers, or use recipe: tensorwise"
            )
        if self.keep_worst and self.noise_file is None:
            raise ValueError(
                "keep_worst: needs to know which layers those are; write a file with `oprd doctor --precision --out PATH` and "
                "give noise: PATH, or use keep_layers"
            )
        return self


def check_roles(precision: PrecisionConfig, dtype: str, trained: bool) -> None:
    """What a teacher and a student may be.

    Raises:
        ValueError: one line.
    """
    if precision.linear == "fp8" and dtype != "bf16":
        raise ValueError(f"precision.linear: fp8 computes all else in bf16, but dtype is {dtype}; use dtype: bf16")
    if trained and precision.linear == "weight_only":
        raise ValueError("precision.linear: weight_only is for a frozen teacher; use fp8 or dtype for the student")
    if trained and precision.fp8_parameters:
        raise ValueError("precision.fp8_parameters: the student trains bf16 parameters; leave it out")
    if trained and precision.noise != "off":
        raise ValueError("precision.noise: is for a frozen teacher; leave it out")
    if not trained and precision.recipe == "delayed":
        raise ValueError(
            "precision.recipe: delayed never updates the scales of a model that is not trained (Transformer Engine does so "
            "where gradients are on); use recipe: tensorwise"
        )
