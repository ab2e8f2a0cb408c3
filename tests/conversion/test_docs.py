"""docs/adding_a_family.md quotes the code as it is."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_worked_example_is_the_real_file() -> None:
    """The family quoted in the guide is families/mistral.py, character for character, and under 100 lines."""
    guide = (REPOSITORY / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
    example = (REPOSITORY / "checkpoints_conversion" / "families" / "mistral.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in guide
    assert len(example.splitlines()) < 100


def test_files_named_in_the_guide_exist() -> None:
    """Every test file that the guide sends its reader to is there."""
    guide = (REPOSITORY / "docs" / "adding_a_family.md").read_text(encoding="utf-8")
    table = guide.split("| file in `tests/` | add |")[1].split("```")[0]
    named = [part for row in table.splitlines() for part in row.split("|")[1:2] for part in part.split("`")[1::2]]
    assert len(named) >= 7
    for name in named:
        assert (REPOSITORY / "tests" / name).is_file(), name
