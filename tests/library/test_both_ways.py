"""Runs that start from Megatron checkpoints, and end in what Megatron-LM and Megatron-Bridge start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file

from checkpoints_conversion import Sharding, mappings_for, read_architecture
from checkpoints_conversion.architecture import VOCAB_MULTIPLE
from checkpoints_conversion.convert.hf_to_megatron import import_hf
from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.describe import describe
from checkpoints_conversion.interop import find_checkpoint_dir, read_run_config
from checkpoints_conversion.live.weights import canonical_parameters
from checkpoints_conversion.reader import HFReader
from checkpoints_conversion.torch_dist import read_common
from checkpoints_conversion.weights import check_weights
from oprd_megatron.bridge.fingerprint import model_fingerprint
from oprd_megatron.config import parse_config
from oprd_megatron.errors import CheckpointError, ConfigError
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.preflight import preflight
from oprd_megatron.rollout.tokenizer import load_tokenizer
from oprd_megatron.saving.export import checkpoint_of
from tests.library.user_models import PLATFORM, Layout, plain_chunk
from tests.ranks import run_ranks
from tests.training.runs import changed, student_tensors, tiny_run, train_records, train_run, with_layout

STILL = {"lr": 1e-30, "weight_decay": 0.0}
"""An optimizer that moves no weight of fp32."""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, a run whose models are Megatron checkpoints by `oprd convert import`)."""
    folder = tmp_path_factory.mktemp("both_ways")
    values = tiny_run(folder, "qwen3")
    for name in ("teacher", "student"):
        import_hf(folder / name, folder / f"{name}_megatron", Options(workers=1), Progress())
    del values["eval"]
    values = changed(values, run={"steps": 1}, optimizer=STILL)
    paths = {"teacher": folder / "teacher_megatron" / "release", "student": folder / "student_megatron"}
    return folder, changed(values, **{name: {"path": str(path)} for name, path in paths.items()})


@pytest.fixture(scope="module")
def trained(imported: tuple[Path, dict[str, Any]]) -> Path:
    """A run that has moved the student, tensor parallel; its directory."""
    _, values = imported
    return train_run(with_layout(changed(values, optimizer={"lr": 1e-3}, run={"steps": 2}), tp=2))


def exported(source: Path, out: Path) -> dict[str, torch.Tensor]:
    """`oprd convert export` without --like."""
    export_megatron(source, out, Options(workers=1), Progress())
    return load_file(out / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_round_trip_is_bitwise(imported: tuple[Path, dict[str, Any]]) -> None:
    """Hugging Face -> torch_dist -> a run that moves nothing, on two stages -> torch_dist -> Hugging Face; taught by its own
    checkpoint the student has a loss of 0, so the teacher's weights arrived as well."""
    folder, values = imported
    same = {"path": str(folder / "student_megatron" / "release")}
    run = train_run(with_layout(changed(values, teacher=same, run={"dir": str(folder / "still")}), pp=2))
    assert_same(exported(run, folder / "back"), load_file(folder / "student" / "model.safetensors"))
    assert train_records(run)[0]["loss"] < 1e-9
    assert load_tokenizer(folder / "back").get_vocab() == load_tokenizer(folder / "student").get_vocab()


def test_a_run_starts_from_another(imported: tuple[Path, dict[str, Any]], trained: Path) -> None:
    """`student.path` is a run, trained at tp 2: its newest checkpoint is read at pp 2, to the last bit. A model's fingerprint
    is the same in either format."""
    folder, values = imported
    before, after = load_file(folder / "student" / "model.safetensors"), student_tensors(trained)
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    again = changed(values, student={"path": str(trained)}, run={"dir": str(folder / "again")})
    assert_same(student_tensors(train_run(with_layout(again, pp=2))), after)
    architecture = read_architecture(folder / "teacher")
    found = [model_fingerprint(folder / name, architecture) for name in ("teacher", "teacher_megatron")]
    assert found[0].difference(found[1]) is None


@torch.no_grad()
def load_as_megatron_lm(checkpoints: Path) -> None:
    """What `--load` does with the weights: the tracker, common.pt, then mcore's load at its default strictness into a model in
    the local spec, at other tp and pp than the run's; each parameter is the exported student's slice."""
    hf_dir, directory = checkpoints.parent / "student_hf", checkpoints / "iter_0000002"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    arch = read_architecture(hf_dir)
    with PLATFORM.scope():
        for tp, pp in ((1, 2), (2, 1), (1, 1)):
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
            rank = parallel_state.get_tensor_model_parallel_rank()
            init_mcore_globals(0, rank)
            sharding = Sharding.smallest(arch, rank, tp, vocab_multiple=VOCAB_MULTIPLE)
            model = plain_chunk(arch, Layout(tp=tp, pp=pp), sharding, 0, per_token=False)
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(directory))
            assert state["args"].padded_vocab_size == 512 and state["args"].num_layers == arch.num_layers
            assert state["args"].no_save_optim and state["iteration"] == 2 and state["checkpoint_version"] == 3.0
            model.load_state_dict(state["model"])
            with HFReader(hf_dir) as reader:
                for name, parameter in canonical_parameters([model]).items():
                    expected = torch.empty_like(parameter)
                    mappings_for(arch)[name].load(expected, reader.read, sharding)
                    assert torch.equal(parameter, expected), f"{name} at tp {tp} pp {pp}"


def test_megatron_lm_loads_a_runs_checkpoint(trained: Path) -> None:
    """Weights, names, arguments and tracker are what its loader looks for; Megatron-Bridge's settings are beside them."""
    run_ranks(2, load_as_megatron_lm, trained / "checkpoints", timeout_seconds=200)
    directory = find_checkpoint_dir(trained)
    config = read_run_config(directory)
    assert config is not None and config["model"]["num_layers"] == 4 and config["model"]["qk_layernorm"] is True
    assert "a training run of this project, iteration 2" in describe(trained).what
    assert check_weights(trained) == read_architecture(trained / "student_hf")


def test_padded_heads_have_no_settings(imported: tuple[Path, dict[str, Any]]) -> None:
    """What does not fit a model of config.json's sizes is not said to; the student comes back without padding all the same."""
    folder, values = imported
    padded = changed(
        values, student={"pad_heads": True}, teacher={"pad_heads": True}, run={"dir": str(folder / "padded")}
    )
    run = train_run(with_layout(padded, tp=4))
    directory = find_checkpoint_dir(run)
    assert read_run_config(directory) is None and "args" not in read_common(directory)
    assert_same(exported(run, folder / "padded_back"), load_file(folder / "student" / "model.safetensors"))


def test_weights_to_score(imported: tuple[Path, dict[str, Any]], trained: Path, tmp_path: Path) -> None:
    """A run's checkpoint is resumed, bridge and all; any other is a model, as `student.path` takes it."""
    folder, _ = imported
    newest = trained / "checkpoints" / "iter_0000002"
    assert [checkpoint_of(path) for path in (trained, newest)] == [newest, newest]
    models = (folder / "student", folder / "student_megatron", folder / "student_megatron" / "release")
    assert [checkpoint_of(path) for path in models] == [None] * 3
    with pytest.raises(CheckpointError, match="neither a Hugging Face directory"):
        checkpoint_of(tmp_path)


def test_refusals_say_what_is_missing(imported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No config beside it, another model's, an unfinished save, an engine that needs Hugging Face files: one line each."""
    folder, values = imported

    values = changed(values, run={"dir": str(tmp_path / "run")})

    def refusal(path: Path, **sections: Any) -> str:
        with pytest.raises((CheckpointError, ConfigError)) as found:
            preflight(parse_config(changed(values, student={"path": str(path)}, **sections), "test"), 1)
        assert "\n" not in str(found.value)
        return str(found.value)

    copy = tmp_path / "copy"
    shutil.copytree(folder / "student_megatron", copy)
    config = json.loads((copy / "hf" / "config.json").read_text())
    (copy / "hf" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert "norm_epsilon" in refusal(copy)
    shutil.rmtree(copy / "hf")
    assert f"without config.json and tokenizer; copy those of its model into {copy / 'hf'}" in refusal(copy)
    (copy / "release" / "metadata.json").unlink()
    assert "unfinished save" in refusal(copy)
    served = {"rollout": {"engine": "vllm"}}
    assert "starts from a Hugging Face directory" in refusal(folder / "student_megatron", **served)
