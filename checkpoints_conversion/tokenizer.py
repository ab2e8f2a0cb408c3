"""What belongs to a model beside its weights: which files are copied, and whether the tokenizer fits the model.

A tokenizer that does not fit trains on nonsense without any error, so it is loaded and compared before a conversion is
worth anything. Code of a repository's own (`*.py`) is neither run nor copied.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import quoted, reason, shown
from checkpoints_conversion.files.regular_file import read_whole
from checkpoints_conversion.reader import refuse_foreign_file
from oprd_megatron.errors import CheckpointError

COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",  # SentencePiece: tokenizer.model, spiece.model
    "tokenizer.model.v*",  # Mistral's
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files of a model directory that go with it, its licence among them: who passes a model on must pass it on."""

PROBES = (
    "Hello world",
    "two  spaces\n\n\ttab ",
    " x",
    "In 2024, 1234567 x 3.14",
    "naïve café: don't",
    "日本語 中文",
    "🙂👩‍👩‍👧",
)
"""What tokenizers with equal vocabularies still cut differently."""
SPECIAL_TOKENS = ("bos", "eos", "pad")
NO_TOKEN = -1
"""Some configs of Llama 1 have this for no padding token."""
MAX_MODEL_BYTES = 2**28


def companion_files(source_dir: Path) -> list[Path]:
    """Everything to copy from a model directory, config.json first.

    Raises:
        CheckpointError: one of them leads out of the directory.
    """
    found = {
        path: None
        for pattern in COMPANION_PATTERNS
        for path in sorted(source_dir.glob(pattern))
        if path.is_file() and path.suffix != ".py"
    }
    for path in found:
        refuse_foreign_file(path, source_dir)
    return list(found)


def copy_companions(source_dir: Path, out_dir: Path) -> None:
    """Copy them into an existing directory.

    Raises:
        CheckpointError: see `companion_files`.
    """
    for path in companion_files(source_dir):
        target = out_dir / path.relative_to(source_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def check_tokenizer(model_dir: Path, arch: Architecture, strict: bool = True) -> list[str]:
    """Load the tokenizer of a model directory and compare it with the model.

    Args:
        model_dir: the directory.
        arch: its model.
        strict: refuse a tokenizer that does not fit; False: report it.

    Returns:
        What a user should know, one line each.

    Raises:
        CheckpointError: a file is broken, or the tokenizer has ids that the embedding does not have.
    """
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")) and not any(
        model_dir.glob("*.model")
    ):
        return [f"{model_dir}: no tokenizer; the model is converted without one"]
    settings = _read_objects(model_dir)
    special_ids = _special_ids(model_dir)
    notes = [*_check_special_ids(special_ids, arch), *_notes_on_code(model_dir)]
    try:
        tokenizer = _load(model_dir)
    except CheckpointError:
        if "auto_map" not in settings:
            raise
        return [*notes, f"{model_dir}: its tokenizer needs code of its own; it is copied unchecked"]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= arch.vocab_size:
        too_many = (
            f"{model_dir}: the tokenizer has token ids up to {highest}, but the model's vocab_size is {arch.vocab_size}; "
            "use the tokenizer files that belong to this model"
        )
        if strict:
            raise CheckpointError(too_many)
        notes.append(too_many)
    return [
        *notes,
        *_compare_special_ids(special_ids, tokenizer),
        *_check_template(tokenizer, model_dir),
        *_compare_sentencepiece(tokenizer, arch, model_dir),
    ]


def _read_objects(model_dir: Path) -> dict[str, Any]:
    """tokenizer_config.json, if there; every JSON file of the tokenizer must be an object."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ):
        path = model_dir / name
        if path.is_file() and not isinstance(read_json(path), dict):
            raise CheckpointError(f"{path}: holds no JSON object; download it again")
    path = model_dir / "tokenizer_config.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def _notes_on_code(model_dir: Path) -> list[str]:
    code = sorted(path.name for path in model_dir.glob("*.py"))
    return [f"{model_dir}: code is not copied: {shown(', '.join(code))}"] if code else []


def _load(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        tokenizer.get_vocab()
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # parsers in other languages: a panic in Rust is no Exception
        name = "tokenizer.json" if (model_dir / "tokenizer.json").is_file() else "tokenizer_config.json"
        raise CheckpointError(
            f"{model_dir / name}: transformers cannot load this tokenizer ({reason(error)}); download it again"
        ) from None


def _special_ids(model_dir: Path) -> list[tuple[Path, str, Any, list[Any]]]:
    """(file, special token, what it says, as a list) for config.json and generation_config.json."""
    found = []
    for name in ("config.json", "generation_config.json"):
        path = model_dir / name
        config = read_json(path) if path.is_file() else {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: holds no JSON object; download it again")
        for token in SPECIAL_TOKENS:
            value = config.get(f"{token}_token_id")
            if value not in (None, NO_TOKEN):
                found.append((path, token, value, value if isinstance(value, list) else [value]))
    return found


def _check_special_ids(special_ids: list[tuple[Path, str, Any, list[Any]]], arch: Architecture) -> list[str]:
    """Special tokens that the embedding does not have: the weights are sound, but text would never end there."""
    return [
        f"{path}: {token}_token_id is {quoted(value)}, but ids go from 0 to {arch.vocab_size - 1}; correct it"
        for path, token, value, ids in special_ids
        if not all(type(each) is int and 0 <= each < arch.vocab_size for each in ids)
    ]


def _compare_special_ids(special_ids: list[tuple[Path, str, Any, list[Any]]], tokenizer: Any) -> list[str]:
    """Ids that are no token, or not the token that the tokenizer takes."""
    notes = []
    known = set(tokenizer.get_vocab().values())
    for path, token, value, ids in special_ids:
        unknown = [each for each in ids if type(each) is int and each not in known]
        if unknown:
            notes.append(f"{path}: {token}_token_id {quoted(unknown[0])} is no token of the tokenizer")
        own = getattr(tokenizer, f"{token}_token_id")
        if own is not None and own not in ids:
            notes.append(f"{path}: {token}_token_id is {quoted(value)}, the tokenizer's is {own}")
    return notes


def _check_template(tokenizer: Any, model_dir: Path) -> list[str]:
    if not tokenizer.chat_template:
        return [f"{model_dir}: no chat template"]
    messages = [{"role": "user", "content": PROBES[0]}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the model's; it raises what it likes
        return [f"{model_dir}: the chat template does not render a user's message ({reason(error)})"]
    return [] if PROBES[0] in text else [f"{model_dir}: the chat template leaves out a user's message"]


def _compare_sentencepiece(tokenizer: Any, arch: Architecture, model_dir: Path) -> list[str]:
    """A SentencePiece model beside tokenizer.json must cut text alike."""
    notes = []
    for path in sorted(model_dir.glob("*.model")):
        data = read_whole(path, MAX_MODEL_BYTES)
        if _is_tiktoken(data):
            notes.append(f"{path}: a tiktoken vocabulary; it is copied unchecked")
            continue
        found = _sentencepiece_ids(path, data)
        if found is None:
            notes.append(f"{path}: copied unchecked, for sentencepiece is not installed")
            continue
        size, ids = found
        if size > arch.vocab_size:
            notes.append(f"{path}: has {size} pieces, the model's vocab_size is {arch.vocab_size}")
        differing = [
            probe
            for probe, mine in zip(PROBES, ids, strict=True)
            if mine != tokenizer(probe, add_special_tokens=False)["input_ids"]
        ]
        if differing:
            told = " and ".join(ascii(probe) for probe in differing[:2])
            notes.append(f"{path}: for {len(differing)} of {len(PROBES)} texts other ids than tokenizer.json: {told}")
    return notes


def _is_tiktoken(data: bytes) -> bool:
    """Lines of a token in base64 and its rank (Llama 3's `original/tokenizer.model`)."""
    token, _, rank = data[:200].partition(b"\n")[0].partition(b" ")
    return bool(token) and token.isascii() and rank.strip().isdigit()


def _sentencepiece_ids(path: Path, data: bytes) -> tuple[int, list[list[int]]] | None:
    """Number of pieces, and the ids of each probe; None without the package."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return None
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(data)
        return processor.vocab_size(), [processor.encode(probe) for probe in PROBES]
    except Exception as error:  # a parser in C++; it raises RuntimeError, and others on bytes that are no model
        raise CheckpointError(
            f"{path}: no SentencePiece model, or damaged ({reason(error)}); download it again"
        ) from None
