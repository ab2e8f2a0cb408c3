"""Parallel layouts: `layout` is plain data, `grid` holds the process groups (and needs mcore)."""

from oprd_megatron.parallel.layout import Coords, GridLayout, check_ranks, resolve_layout, tp_divisible

__all__ = ["Coords", "GridLayout", "check_ranks", "resolve_layout", "tp_divisible"]
