"""A group of commands of which one is meant where none is named: `oprd rollout RUN.yaml` is `oprd rollout write RUN.yaml`."""

from __future__ import annotations

from typer.core import TyperGroup


def default_command(name: str) -> type[TyperGroup]:
    """The class of a group in which `name` may be left out. The first word must then not be another command's."""

    class WithDefault(TyperGroup):
        def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
            if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
                args = [name, *args]
            return super().parse_args(ctx, args)

    return WithDefault
