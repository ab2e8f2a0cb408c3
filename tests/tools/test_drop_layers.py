"""tools/drop_layers.py: the student is the teacher without some layers, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd_megatron.errors import CheckpointError
from tests.tiny_models import Family, tiny_hf_model
from tools.drop_layers import drop_layers, layer_origin, main, shorten_config

IDS = torch.tensor([[5, 70, 80, 9, 200]])


def load(hf_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", False)])
def test_the_student_is_the_teacher_without_the_layers(
    tmp_path: Path, family: Family, tied: bool, sharded: bool
) -> None:
    """Logits and every hidden state equal those of the loaded teacher with the same layers taken out."""
    teacher = tiny_hf_model(family, tmp_path / "teacher", tied=tied, num_layers=5)
    if sharded:
        (tmp_path / "teacher" / "model.safetensors").unlink()
        teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
        assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 3
    origin = drop_layers(tmp_path / "teacher", tmp_path / "student", [2, 5])
    assert origin == {1: 1, 2: 3, 3: 4}
    student = load(tmp_path / "student")
    teacher = load(tmp_path / "teacher")
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[layer - 1] for layer in origin.values())
    teacher.config.num_hidden_layers = 3
    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        expected, got = (model(IDS, output_hidden_states=True, use_cache=False) for model in (teacher, student))
    assert torch.equal(got.logits, expected.logits)
    assert len(got.hidden_states) == 4
    assert all(map(torch.equal, got.hidden_states, expected.hidden_states))


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    """Tokenizer files are copied, per-layer lists shortened, the origin is written with 1-based layers."""
    tiny_hf_model("qwen2", tmp_path / "teacher", num_layers=4)
    (tmp_path / "teacher" / "pytorch_model.bin").write_bytes(b"old")
    drop_layers(tmp_path / "teacher", tmp_path / "student", [1])
    read = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= read
    assert "pytorch_model.bin" not in read
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 3
    origin = json.loads((tmp_path / "student" / "layer_origin.json").read_text())
    assert origin == {"source": str(tmp_path / "teacher"), "layers": {"1": 2, "2": 3, "3": 4}}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == 260


def test_per_layer_settings_follow_their_layer() -> None:
    """Lists with one entry a layer keep those of the kept layers; max_window_layers counts kept bottom layers."""
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "max_window_layers": 2,
        "architectures": ["X"],
    }
    shorter = shorten_config(config, layer_origin(4, [2, 3]))
    assert shorter == {
        "num_hidden_layers": 2, "layer_types": ["a", "d"], "max_window_layers": 1, "architectures": ["X"],
    }  # fmt: skip


def test_layers_are_checked() -> None:
    """Layers are 1-based: 0 and one past the last are out of range; repeating one or dropping all is refused."""
    for drop, message in [
        ([0], "layers 1..4"),
        ([5], "layers 1..4"),
        ([2, 2], "twice"),
        ([1, 2, 3, 4], "all 4 layers"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            layer_origin(4, drop)


def test_bad_directories_are_one_line(tmp_path: Path) -> None:
    """No model, torn weights, fewer layers than the config says, an output that exists; nothing is left behind."""
    source = tmp_path / "teacher"
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"config\.json: No such file or directory; give a Hugging Face"):
        drop_layers(source, out, [1])
    tiny_hf_model("llama", source, num_layers=3)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"says 4 layers, but 3 are in the weights"):
        drop_layers(source, out, [1])
    (source / "config.json").write_text(json.dumps(config))
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        drop_layers(source, out, [1])
    (source / "model.safetensors").write_bytes(weights)
    assert not out.exists() and not out.with_name("out.tmp").exists()
    drop_layers(source, out, [1])
    with pytest.raises(CheckpointError, match="exists already"):
        drop_layers(source, out, [1])


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the layer map to paste; a user's mistake is one line on stderr and code 2."""
    tiny_hf_model("llama", tmp_path / "teacher", num_layers=3)
    assert main([str(tmp_path / "teacher"), str(tmp_path / "student"), "--drop", "2"]) == 0
    assert capsys.readouterr().out.endswith("distill:\n  layer_map: {1: 1, 2: 3}\n")
    assert main([str(tmp_path / "teacher"), str(tmp_path / "other"), "--drop", "9"]) == 2
    assert capsys.readouterr().err == "error: --drop 9: the model has layers 1..3 (counted from 1)\n"
    with pytest.raises(SystemExit) as stopped:
        main(["a", "b", "--drop", "x"])
    assert stopped.value.code == 2
