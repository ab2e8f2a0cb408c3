"""Files that strangers wrote: run_config.yaml read without executing it, and the checkpoint found in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints_conversion.interop import RUN_CONFIG, TRACKER, find_checkpoint_dir, read_run_config
from oprd_megatron.errors import CheckpointError


class Touched:
    """Would leave a file behind if anything built it."""

    def __init__(self, path: str) -> None:
        Path(path).touch()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {_target_: os.system, _args_: [touch spot], _call_: true}",
            {"_target_": "os.system", "_args_": ["touch spot"], "_call_": True},
        ),
        ("model: !!python/object/apply:os.system ['touch spot']", ["touch spot"]),
        ("model: !!python/object/new:test_interop_files.Touched {path: spot}", {"path": "spot"}),
        ("model: !!python/name:os.system", ""),
        ("model: !mine {a: !other [1, !!python/tuple [2]]}", {"a": [1, [2]]}),
        ("base: &b {x: 1}\nmodel: {<<: *b, y: 2}", {"<<": {"x": 1}, "y": 2}),
    ],
)
def test_yaml_is_read_as_plain_values(
    text: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tag and no target is executed: what it is written as is what is read."""
    monkeypatch.chdir(tmp_path)
    Path(RUN_CONFIG).write_text(text)
    found = read_run_config(tmp_path)
    assert found is not None and found["model"] == expected
    assert not Path("spot").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- 1\n- 2", "no settings by name"),
        ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "x" * 2**20, "too many for such a file"),
        ("model: {[1, 2]: 3, {a: b}: 4}", "not valid YAML"),
        ("when: 2026-99-99", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_broken_yaml_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    """Torn, deep, large or odd: one line that names the file."""
    (tmp_path / RUN_CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_run_config(tmp_path)
    assert str(tmp_path / RUN_CONFIG) in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_that_doubles_itself_is_read_at_once(tmp_path: Path) -> None:
    """Aliases of aliases (2^40 items if they were copied) cost nothing, merged keys included."""
    lines = ["a0: &a0 {k: v}"] + [
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], l: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)
    ]
    (tmp_path / RUN_CONFIG).write_text("\n".join([*lines, "model: *a39"]))
    found = read_run_config(tmp_path)
    assert found is not None and found["model"] is found["a39"]


def make(folder: Path, *files: str) -> Path:
    """A directory with empty files; metadata.json and trackers get what they usually hold."""
    contents = {"metadata.json": '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}', TRACKER: "release"}
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents.get(path.name, ""))
    return folder


@pytest.mark.parametrize(
    ("files", "tracker", "given", "expected"),
    [
        (["release/metadata.json", TRACKER], "release\n", "", "release"),
        (["release/metadata.json", TRACKER], "release", "release", "release"),
        (["iter_0000010/metadata.json", "iter_0000020/metadata.json", TRACKER], "10", "", "iter_0000010"),
        (["iter_0000010/metadata.json", "iter_0000020/metadata.json", TRACKER], "10", "iter_0000020", "iter_0000020"),
        (["iter_0000009/metadata.json", "iter_0000010/metadata.json", "latest_train_state.pt"], "", "", "iter_0000010"),
        (
            ["run.yaml", "checkpoints/iter_0000003/metadata.json", f"checkpoints/{TRACKER}"],
            "3",
            "",
            "checkpoints/iter_0000003",
        ),
        (["context/model.yaml", "weights/metadata.json"], "", "", "weights"),
        (["iter_0000010/metadata.json", "iter_0000011.incomplete/.metadata"], "", "", "iter_0000010"),
    ],
)
def test_the_checkpoint_is_found(files: list[str], tracker: str, given: str, expected: str, tmp_path: Path) -> None:
    """Ours, Megatron-LM's, Bridge's (with and without tracker), a run of this project, NeMo 2's; or one directory of them."""
    folder = make(tmp_path / "out", *files)
    for path in folder.rglob(TRACKER):
        path.write_text(tracker)
    assert find_checkpoint_dir(folder / given) == folder / expected


@pytest.mark.parametrize(
    ("files", "tracker", "message"),
    [
        (["iter_0000005/mp_rank_00/model_optim_rng.pt", TRACKER], "5", "--ckpt-convert-format torch_dist"),
        (["iter_0000005/.metadata", "iter_0000005/__0_0.distcp", TRACKER], "5", "fsdp_dtensor"),
        (["config.json", "model.safetensors"], "", "Hugging Face directory"),
        (["iter_0000005/metadata.json", TRACKER], "7", "names iter_0000007, which is not there"),
        (["iter_0000005/metadata.json", TRACKER], "../../etc", "must hold a number or release"),
        (["iter_0000005/metadata.json", TRACKER], "five\x1b[2J", "must hold a number or release"),
        (["iter_0000005/metadata.json", TRACKER], "x" * 5000, "too many for such a file"),
        (["iter_0000005.incomplete/.metadata"], "", "unfinished iter_0000005.incomplete"),
        (["notes.txt"], "", "holds neither metadata.json nor"),
    ],
)
def test_what_is_no_readable_checkpoint_is_refused(
    files: list[str], tracker: str, message: str, tmp_path: Path
) -> None:
    """Other formats by name, broken trackers, unfinished saves: one line that says what to do."""
    folder = make(tmp_path / "out", *files)
    for path in folder.rglob(TRACKER):
        path.write_text(tracker)
    with pytest.raises(CheckpointError, match=message) as caught:
        find_checkpoint_dir(folder)
    assert str(caught.value).isprintable()


def test_other_backends_and_unfinished_directories_are_refused(tmp_path: Path) -> None:
    """A zarr checkpoint by its metadata.json; a directory that is still being written by its name; one that is not there."""
    zarr = make(tmp_path / "zarr", "metadata.json")
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    for path, message in (
        (zarr, "format is 'zarr'"),
        (make(tmp_path / "out.incomplete", "release/metadata.json"), "is unfinished"),
        (tmp_path / "nowhere", "no such directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint_dir(path)
