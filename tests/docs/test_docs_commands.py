"""README, CONTRIBUTING, docs/*.md and the help texts do not lie: what they tell a reader to type is parsed as the program would
parse it, and settings they show are read as a config. Nothing is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from oprd_megatron.cli import app
from oprd_megatron.config import RunConfig, load_config, parse_config
from oprd_megatron.config.base import sections_in

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart.yaml"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
STARTERS = ("oprd", "torchrun", "python", "bash")
FILES = (".yaml", ".json", ".jsonl", ".png", ".safetensors", ".md", ".py", ".lock")
A_TEACHERS_NAME = re.compile(r"teacher=\w+$")  # of a config with several

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def parser() -> Any:
    """The command line, with commands that only return what they were given."""
    root = get_command(app)
    for _, command in commands(root):
        command.callback = lambda **given: given
    return root


def commands(command: Any, name: str = "oprd") -> Iterator[tuple[str, Any]]:
    """(what is typed, command), for all that do something."""
    if not hasattr(command, "commands"):
        yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


def typed_lines(text: str) -> Iterator[list[str]]:
    """Words of each line that is a command, in a fence of other than Python or indented, one list for each side of `&&`."""
    text = re.sub(r"^```python$.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith(tuple(f"{word} " for word in STARTERS)):
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            yield words


def check_typed(words: list[str]) -> None:
    """The program takes these words, and its settings make a config."""
    given: dict[str, Any] = {}
    if words[0] == "oprd" and not {"-h", "--help"} & set(words):
        given = parser().main(words[1:], prog_name="oprd", standalone_mode=False)
    elif "oprd_megatron.train" in words:
        config, *overrides = words[words.index("oprd_megatron.train") + 1 :]
        given = {"config": config, "overrides": overrides}
    for word in words[1:]:
        if word.startswith("tools/") and word.endswith((".py", ".sh")):
            assert (REPOSITORY / word).is_file(), word
    if given.get("overrides"):
        config = REPOSITORY / given["config"]
        settings = [setting for setting in given["overrides"] if not A_TEACHERS_NAME.match(setting)]
        load_config(config if config.is_file() else QUICKSTART, settings)


def check_named(words: list[str]) -> None:
    """A command named within a sentence exists, with the options that stand beside it; the rest may be missing."""
    command = root = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert command is not root or not words or words[0].startswith("-"), f"oprd has no command {words[0]!r}"
    below = getattr(command, "commands", {}).values()  # `oprd rollout RUN.yaml` is `oprd rollout write RUN.yaml`
    parameters = [parameter for each in (command, *below) for parameter in each.params]
    known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert options <= known | {"--help"}, f"{command.name}: no {options - known}"


def is_key(dotted: str) -> bool:
    """Whether a config has this key: `optimizer.lr`, also of one of several teachers or terms."""
    sections: list[Any] = [RunConfig]
    for word in dotted.split("."):
        fields = {name: field for section in sections for name, field in section.model_fields.items()}
        if word not in fields:
            return False
        sections = sections_in(fields[word].annotation)
    return True


def merged(given: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`given`, and what only `base` has."""
    both = {key: merged(given[key], base[key]) for key in given.keys() & base.keys() if isinstance(given[key], dict)}
    return {**base, **given, **both}


@every_page
def test_commands_to_type_are_taken(page: Path) -> None:
    """Names, options, types and settings of every command line."""
    for words in typed_lines(page.read_text()):
        check_typed(words)


@every_page
def test_commands_in_sentences_exist(page: Path) -> None:
    """`oprd ..` within a sentence names a command and options of it."""
    for text in re.findall(r"`oprd ([^`\n]+)`", page.read_text()):
        check_named(shlex.split(text, comments=True))


@every_page
def test_keys_in_sentences_exist(page: Path) -> None:
    """`optimizer.lr`, `distill.k: 2000` or `run.seed=5` within a sentence is a key of a config."""
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for key in re.findall(r"(?:^|(?<= )|(?<='))([a-z_]+(?:\.[a-z_]+)+)(?=$|=|: | )", code):
            if key.split(".")[0] in RunConfig.model_fields and not key.endswith(FILES):
                assert is_key(key), f"{key} in `{code}`"


def test_examples_in_the_help_are_taken() -> None:
    """The examples that `--help` gives are taken like those in pages."""
    examples = [
        text for _, command in commands(get_command(app))
        for text in re.findall(r"`(oprd [^`]+)`", (command.help or "").partition("Example")[2])
    ]  # fmt: skip
    assert len(examples) > 10
    for text in examples:
        check_typed(shlex.split(text))


@every_page
def test_settings_are_a_config(page: Path) -> None:
    """Every ```yaml block is a whole config, or settings that one may have."""
    whole = yaml.safe_load(QUICKSTART.read_text())
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        given = yaml.safe_load(block)
        base = {key: value for key, value in whole.items() if not (key == "teacher" and "teachers" in given)}
        parse_config(merged(given, base), page.name)


def test_the_readmes_config_is_whole(tmp_path: Path) -> None:
    """What the README tells a newcomer to save as mine.yaml is a config by itself."""
    (text,) = re.findall(r"cat > mine.yaml <<'END'\n(.*?)END", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    config = load_config(mine)
    assert {config.teacher.path.name, config.student.path.name} == {"smollm2-135m-instruct", "smollm2-24-layers"}


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that pages outside of docs/ link to exist; Sphinx checks those of docs/."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_messages_in_troubleshoot_are_the_programs() -> None:
    """What the page quotes as a symptom is said somewhere in the code, apart from names and numbers."""
    folders = [REPOSITORY / name for name in ("oprd_megatron", "checkpoints_conversion", "tools")]
    code = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".sh")]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in code))
    page = (REPOSITORY / "docs" / "troubleshoot.md").read_text()
    symptoms = re.findall(r"^\| (`.*?) \| .* \| .* \|$", page, re.MULTILINE)
    assert len(symptoms) > 25
    for symptom in symptoms:
        for quoted in re.findall(r"`([^`]+)`", symptom):
            pieces = re.split(r"\.\.|[\d.]*\d|'\w+'|\(|\)|:|\S+/\S+|\w+\.txt", quoted)
            for piece in (piece.strip(" ,;") for piece in pieces):
                assert len(piece) < 12 or piece in said, f"{piece!r} of {quoted!r}"
