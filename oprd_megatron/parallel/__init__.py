"""Parallel layouts: `layout` is plain data, `grid` holds the process groups."""

from oprd_megatron.parallel.grid import Grid, build_grid
from oprd_megatron.parallel.layout import Coords, GridLayout, resolve_layout

__all__ = ["Coords", "Grid", "GridLayout", "build_grid", "resolve_layout"]
