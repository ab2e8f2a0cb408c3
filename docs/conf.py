"""Sphinx: `bash tools/docs.sh` builds this folder into docs/_build/html; a dead link is an error.

Pages are Markdown (MyST). Three are filled in here, so that no copy of what the code says can grow old: every key of a config
(`config.md`), every command (`commands.md`), and the signatures in `api.md`.
"""

import re

from sphinx.application import Sphinx
from typer.cli import get_docs_for_click
from typer.main import get_command
from typer.models import Context

from oprd_megatron.cli import app as oprd
from oprd_megatron.config.describe import describe_config

project = "OPRD on Megatron"
author = "the authors of OPRD on Megatron"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
html_show_copyright = False
html_show_sphinx = False
smartquotes = False  # options are written with two hyphens

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
default_role = "code"  # docstrings are written with `single` ticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True


def config_page() -> str:
    """`oprd config` as a page: a heading for each section, a definition for each key."""
    lines = []
    for line in describe_config().splitlines():
        if title := re.match(r"# ([^:]+(?:, kind: \w+)?): (.*)", line):
            lines.append(f"## {title[1]}\n\n{_markdown(title[2])}\n")
        elif line.startswith("    "):
            lines.append(f":   {_markdown(line.strip())}\n")
        elif line:
            lines.append(f"`{line}`")
    return "\n".join(lines)


def commands_page() -> str:
    """`oprd --help` and that of every command below it."""
    command = get_command(oprd)
    return get_docs_for_click(obj=command, ctx=Context(command), name="oprd").partition("\n")[2]


def _markdown(text: str) -> str:
    """Prose of a docstring, in which <, [ and * are themselves outside of `code`."""
    parts = text.split("`")
    return "`".join(part if number % 2 else re.sub(r"([<\[*_|])", r"\\\1", part) for number, part in enumerate(parts))


GENERATED = {"config": config_page, "commands": commands_page}


def fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    """Append what the code says to a page that consists of a title and a sentence."""
    if page in GENERATED:
        source[0] += "\n" + GENERATED[page]()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", fill_in)
