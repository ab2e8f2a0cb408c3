"""What a GGUF file holds beside the weights, as a Hugging Face directory has it: config.json, tokenizer, chat template.

transformers rebuilds the tokenizer from the vocabulary and merges. How text is cut before the merges apply is only a name
in the file (`tokenizer.ggml.pre`); a wrong cut gives other ids for the same text and no error, so the rule is set here for
the names that are known, and no tokenizer is written for others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints_conversion.files.messages import quoted, reason
from checkpoints_conversion.formats.gguf_config import gguf_config
from checkpoints_conversion.formats.gguf_model import GGUFModel
from oprd_megatron.errors import CheckpointError

GPT2_MODEL = "gpt2"
"""`tokenizer.ggml.model` of byte-level BPE."""
SENTENCEPIECE_MODEL = "llama"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
"""Where text is cut, by `tokenizer.ggml.pre`; as the tokenizers of these models were published."""
GPT2_PRE, SMOLLM_PRE = "gpt-2", "smollm"


def write_gguf_companions(path: Path, out_dir: Path) -> list[str]:
    """Write config.json, generation_config.json and the tokenizer into an existing directory.

    Returns:
        What a user should know, one line each.

    Raises:
        CheckpointError: the model or its tokenizer is not understood.
    """
    model = GGUFModel(path)
    try:
        config = gguf_config(model)
        settings = model.settings
    finally:
        model.close()
    generation: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(out_dir / "config.json", config)
    if generation:
        _write_json(out_dir / "generation_config.json", generation)
    return _write_tokenizer(model.path, settings, config, out_dir)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(path: Path, settings: dict[str, Any], config: dict[str, Any], out_dir: Path) -> list[str]:
    kind, pre = settings.get("tokenizer.ggml.model"), settings.get("tokenizer.ggml.pre")
    advice = "no tokenizer is written; copy that of the original model"
    if kind is None:
        return [f"{path}: holds no tokenizer; copy that of the original model"]
    if kind not in (GPT2_MODEL, SENTENCEPIECE_MODEL):
        return [f"{path}: its tokenizer is of type {quoted(kind)}, which is not known; {advice}"]
    if kind == GPT2_MODEL and pre not in (*SPLITS, GPT2_PRE, SMOLLM_PRE):
        return [f"{path}: its tokenizer cuts text by a rule {quoted(pre)} that is not known; {advice}"]
    tokenizer = _load_tokenizer(path)
    if kind == GPT2_MODEL:
        tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(str(pre))
    if settings.get("tokenizer.ggml.add_bos_token") is True and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True
    tokenizer.model_max_length = config["max_position_embeddings"]
    tokenizer.save_pretrained(out_dir)
    return []


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # transformers has no list of what it raises on a vocabulary that is none
        raise CheckpointError(f"{path}: transformers cannot read its tokenizer ({reason(error)})") from None


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pre == GPT2_PRE:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == SMOLLM_PRE:  # numbers digit by digit
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    split = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
