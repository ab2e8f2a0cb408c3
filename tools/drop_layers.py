"""A student that shares its origin with the teacher: copy a Hugging Face model without some of its layers.

Every layer that stays is equal to the teacher's layer it came from, so the two models' representation spaces are
aligned and OPRD-Vanilla (OPRD Eq. 6) applies. Layers are counted from 1.

    python tools/drop_layers.py demo/teacher demo/student --drop 10,13,16,19,22,25

Works on any decoder whose layers are named model.layers.N. in safetensors. The model is never loaded: tensors are read
one output file at a time. It prints the `distill.layer_map` for the run's YAML and also writes it to layer_origin.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oprd_megatron.errors import CheckpointError, UserError

LAYER = re.compile(r"^model\.layers\.(\d+)\.")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NOT_COPIED = re.compile(
    r"(\.safetensors|\.safetensors\.index\.json|\.bin|\.pth?|\.gguf)$|^config\.json$|^layer_origin\.json$"
)


def drop_layers(source: Path, out_dir: Path, drop: list[int]) -> dict[int, int]:
    """Write `source` without the 1-based layers `drop` to `out_dir` (through `<out_dir>.tmp`).

    Returns:
        {student layer: teacher layer}, 1-based: where each remaining layer came from.

    Raises:
        CheckpointError: not a Hugging Face directory, a layer out of range, or `out_dir` exists.
    """
    config = _read_json(source / "config.json")
    num_layers = config.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        raise CheckpointError(
            f"{source}/config.json: has no num_hidden_layers; only plain decoder models are supported"
        )
    origin = layer_origin(num_layers, drop)
    if out_dir.exists():
        raise CheckpointError(f"{out_dir}: exists already; remove it or name another directory")
    shards = _tensor_names(source, num_layers)
    staging = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _write_weights(source, staging, shards, origin)
    _write_json(staging / "config.json", shorten_config(config, origin))
    _write_json(staging / "layer_origin.json", {"source": str(source.resolve()), "layers": origin})
    for path in source.iterdir():
        if path.is_file() and not NOT_COPIED.search(path.name):
            shutil.copy2(path, staging / path.name)
    staging.rename(out_dir)
    return origin


def layer_origin(num_layers: int, drop: list[int]) -> dict[int, int]:
    """{student layer: teacher layer}, 1-based, after the layers `drop` are gone.

    Raises:
        CheckpointError: a layer that is not there, named twice, or none left.
    """
    for layer in drop:
        if not 1 <= layer <= num_layers:
            raise CheckpointError(f"--drop {layer}: the model has layers 1..{num_layers} (counted from 1)")
        if drop.count(layer) > 1:
            raise CheckpointError(f"--drop names layer {layer} twice")
    kept = [layer for layer in range(1, num_layers + 1) if layer not in drop]
    if not kept:
        raise CheckpointError(f"--drop names all {num_layers} layers; at least one has to stay")
    return dict(enumerate(kept, start=1))


def shorten_config(config: dict[str, Any], origin: dict[int, int]) -> dict[str, Any]:
    """`config` with the new layer count; lists with one entry a layer (layer_types, ..) keep the remaining entries."""
    num_layers = config["num_hidden_layers"]
    shorter = dict(config)
    for key, value in config.items():
        if "layer" in key and isinstance(value, list) and len(value) == num_layers:
            shorter[key] = [value[layer - 1] for layer in origin.values()]
    shorter["num_hidden_layers"] = len(origin)
    if config.get("max_window_layers") is not None:  # Qwen: the number of bottom layers with full attention
        shorter["max_window_layers"] = sum(layer <= config["max_window_layers"] for layer in origin.values())
    return shorter


def renamed(name: str, origin: dict[int, int]) -> str | None:
    """A tensor's name in the student, None if its layer is gone. Names count layers from 0, `origin` from 1."""
    match = LAYER.match(name)
    if match is None:
        return name
    student_layer = {teacher: student for student, teacher in origin.items()}.get(int(match[1]) + 1)
    return None if student_layer is None else f"model.layers.{student_layer - 1}.{name[match.end() :]}"


def _write_weights(source: Path, out_dir: Path, shards: dict[str, list[str]], origin: dict[int, int]) -> None:
    """Copy the safetensors file by file, so that memory holds one file; a file left empty is not written."""
    weight_map: dict[str, str] = {}
    size = 0
    for shard, names in shards.items():
        new_names = {name: renamed(name, origin) for name in names}
        with safe_open(source / shard, framework="pt") as opened:
            tensors = {new: opened.get_tensor(name) for name, new in new_names.items() if new is not None}
        if tensors:
            save_file(tensors, out_dir / shard, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard)
            size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_json(out_dir / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _tensor_names(source: Path, num_layers: int) -> dict[str, list[str]]:
    """{file name: names of its tensors} of the index's files or of the single file; no tensor is read."""
    files = set(_read_json(source / INDEX)["weight_map"].values()) if (source / INDEX).is_file() else {SINGLE}
    shards = {}
    for file in sorted(files):
        try:
            with safe_open(source / file, framework="pt") as opened:
                shards[file] = list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{source / file}: cannot be read ({error}); give a Hugging Face directory with safetensors weights"
            ) from None
    layers = {int(match[1]) + 1 for names in shards.values() for name in names if (match := LAYER.match(name))}
    if layers != set(range(1, num_layers + 1)):
        raise CheckpointError(
            f"{source}: config.json says {num_layers} layers, but {len(layers)} are in the weights as model.layers.N."
        )
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when the student is written, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="Hugging Face directory of the teacher")
    parser.add_argument("out_dir", type=Path, help="directory to write; must not exist")
    parser.add_argument(
        "--drop", type=layer_list, required=True, metavar="L,L,..", help="layers to leave out, counted from 1"
    )
    options = parser.parse_args(arguments)
    try:
        origin = drop_layers(options.source, options.out_dir, options.drop)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pairs = ", ".join(f"{student}: {teacher}" for student, teacher in origin.items())
    print(f"{options.out_dir}: {len(origin)} of {len(origin) + len(options.drop)} layers; for the run's YAML:")
    print(f"distill:\n  layer_map: {{{pairs}}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
