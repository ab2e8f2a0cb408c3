"""docs/integrate.md quotes code as it is, and the worked example runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import oprd_megatron.library as library
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

REPOSITORY = Path(__file__).parents[2]


def test_the_lines_quoted_are_the_examples() -> None:
    """Every line that the example marks is in the guide, in order, with the lines of its statement."""
    guide = (REPOSITORY / "docs" / "integrate.md").read_text(encoding="utf-8")
    example = (REPOSITORY / "examples" / "megatron_loop.py").read_text(encoding="utf-8")
    block = next(found for found in re.findall(r"```python\n(.*?)```", guide, re.S) if "# <--" in found)
    assert block in example.replace("        data = batches", "") and block.count("# <--") == example.count("  # <--")


def test_names_and_files_in_the_guide_exist() -> None:
    """What it calls public is, and the tests that it names are there."""
    guide = (REPOSITORY / "docs" / "integrate.md").read_text(encoding="utf-8")
    for name in library.__all__:
        assert name in guide or name in ("Attachment",), name
    named = re.findall(r"`((?:tests|examples)/[\w/]+\.py)`", guide)
    assert len(named) >= 3 and all((REPOSITORY / name).is_file() for name in named)


def example(student: Path, teacher: Path, tp: int, pp: int, lm_loss: bool) -> list[float]:
    from examples.megatron_loop import main

    return main(
        argparse.Namespace(
            student=student, teacher=teacher, tp=tp, pp=pp, lm_loss=lm_loss, steps=2, micro_batch_size=2,
            num_microbatches=2, seq_length=16, lr=1e-3, coefficient=100.0,
        )
    )  # fmt: skip


def test_the_example_runs(tmp_path: Path) -> None:
    """Megatron-LM's loop on two ranks: tp 2 and pp 2 have the same losses, before and after an update; another one with the
    loop's own loss, which moves the student elsewhere."""
    for name, layers in (("teacher", 5), ("student", 4)):
        tiny_hf_model("llama", tmp_path / name, num_layers=layers, std=0.1)
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    tp2, pp2, with_lm = (
        run_ranks(2, example, student, teacher, *layout)[0] for layout in ((2, 1, False), (1, 2, False), (1, 2, True))
    )
    assert tp2 == pytest.approx(pp2, rel=1e-4)
    assert with_lm[0] == pytest.approx(pp2[0], rel=1e-6) and with_lm[1] != pytest.approx(pp2[1], rel=1e-3)
