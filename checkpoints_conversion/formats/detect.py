"""What kind of weights a path holds; for what is not read, one line that says what it is and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from checkpoints_conversion.families.base import read_config
from checkpoints_conversion.files.messages import shown
from checkpoints_conversion.formats.bin import INDEX_FILE as BIN_INDEX
from checkpoints_conversion.formats.bin import SINGLE_FILE as BIN_FILE
from checkpoints_conversion.formats.gguf_model import SPLIT_NAME
from checkpoints_conversion.reader import INDEX_FILE, SINGLE_FILE, refuse_foreign_file
from oprd_megatron.errors import CheckpointError

WeightFormat = Literal["safetensors", "bin", "gguf"]

_USE_SAFETENSORS = "use the safetensors of this model"
_FOREIGN = (
    ("adapter_*", "a LoRA adapter, not a model", "merge it into its base model (peft: merge_and_unload) and save that"),
    ("quantize_config.json", "weights quantised by GPTQ", "use the unquantised model"),
    ("quant_config.json", "weights quantised by AWQ", "use the unquantised model"),
    ("model*.safetensors", "safetensors without their index", f"download {INDEX_FILE} as well"),
    ("consolidated*.safetensors", "weights in Mistral's own layout", "download model.safetensors or its shards"),
    ("*.safetensors", "safetensors under other names", f"name the file {SINGLE_FILE}, or download its index"),
    ("pytorch_model*.bin", "PyTorch weights without their index", f"download {BIN_INDEX} as well"),
    ("consolidated*.pth", "weights in Meta's own layout", "download the Hugging Face version of this model"),
    ("*.distcp", "a Megatron checkpoint", "give the directory of a Hugging Face model"),
    ("*.h5", "TensorFlow weights", _USE_SAFETENSORS),
    ("*.msgpack", "Flax weights", _USE_SAFETENSORS),
    ("*.onnx", "an ONNX graph", _USE_SAFETENSORS),
    ("*.npz", "MLX or NumPy weights", _USE_SAFETENSORS),
    ("*.ckpt", "a training checkpoint", "save the model with save_pretrained"),
    ("*.pt", "a training checkpoint", "save the model with save_pretrained"),
    ("*.pth", "a training checkpoint", "save the model with save_pretrained"),
    ("*.bin", "PyTorch weights under another name", f"name the file {BIN_FILE} if it holds the model's state dict"),
)
"""(files that tell, what it is, what to do), the first that fits."""


def weight_format(path: Path) -> WeightFormat:
    """What `open_source` will read.

    Raises:
        CheckpointError: nothing there, or something that is not read.
    """
    try:
        if path.is_file():
            return _format_of_file(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such model directory; give the directory that holds config.json")
        return _format_of_directory(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def gguf_file(path: Path) -> Path:
    """The GGUF file that a path of that format means: itself, or the model in a directory, its first file if split.

    Raises:
        CheckpointError: the directory holds several models.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    models = {match["stem"] if (match := SPLIT_NAME.fullmatch(file.name)) else file.name for file in files}
    if len(models) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path}: has {len(models)} GGUF models ({shown(names)}); give the file of one")
    refuse_foreign_file(files[0], path)
    return files[0]


def _format_of_file(path: Path) -> WeightFormat:
    if path.suffix == ".gguf":
        return "gguf"
    for pattern, what, remedy in _FOREIGN:
        if path.match(pattern) and path.suffix not in (".safetensors", ".bin", ".json"):
            raise CheckpointError(f"{path}: {what}, which is not read; {remedy}")
    raise CheckpointError(f"{path}: is a file; give the directory that holds config.json, or a .gguf file")


def _format_of_directory(path: Path) -> WeightFormat:
    if (path / "config.json").is_file():
        _refuse_quantised(path)
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return "safetensors"
    if (path / BIN_FILE).is_file() or (path / BIN_INDEX).is_file():
        return "bin"
    if any(path.glob("*.gguf")):
        return "gguf"
    if any(path.glob("*.incomplete")):
        raise CheckpointError(f"{path}: an unfinished download; finish it")
    for pattern, what, remedy in _FOREIGN:
        found = sorted(path.glob(pattern))
        if found:
            raise CheckpointError(f"{path}: holds {what} ({shown(found[0].name)}), which is not read; {remedy}")
    raise CheckpointError(f"{path}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}; finish the download")


def _refuse_quantised(path: Path) -> None:
    found = read_config(path).get("quantization_config")
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else None
    raise CheckpointError(
        f"{path}: quantised weights ({shown(method or 'unknown method')}) are not read; dequantise the model first"
    )
