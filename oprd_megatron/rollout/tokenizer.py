"""Tokenizers: loading one from a model directory, and the checks that it fits its model and that two of them agree.

OPRD feeds the same token ids to teacher and student (docs/method.md), so a tokenizer that disagrees with either model
trains on nonsense without any error. The checks here are cheap and run once, before anything is loaded.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from checkpoints_conversion.weights import hf_dir_of
from oprd_megatron.errors import CheckpointError, DataError

PROBE = "In 2024, she paid $1,234.50\n\n\tfor 37 naïve cafés: don't  ask 'why?'  日本語 🙂"
"""Digits, punctuation, runs of white space, accents and other scripts: what tokenizers with equal vocabularies still
cut differently (a lost digit rule, another normalisation)."""


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or the one beside a Megatron checkpoint. Reads only local files and runs no
    code from them.

    Raises:
        CheckpointError: the directory is missing or holds no tokenizer that transformers knows.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a Hugging Face model directory")
    path = hf_dir_of(path)
    if not (path / "tokenizer_config.json").is_file() and not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path}: no tokenizer_config.json or tokenizer.json; copy the model's tokenizer files there"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: transformers cannot load this tokenizer ({reason})") from None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, path: Path | str) -> None:
    """Refuse a tokenizer with token ids that the model's embedding does not have.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding (config.json's vocab_size); more rows than tokens is fine.
        path: Model directory, for the message.

    Raises:
        DataError: the highest token id is vocab_size or above.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise DataError(
            f"{path}: the tokenizer has token ids up to {highest}, but the model's vocab_size is {vocab_size}; "
            "use the tokenizer files that belong to this model"
        )


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse two models that read the same text as different token ids.

    Compares the vocabularies and how both cut a probe text. Chat templates may differ: the student's writes the prompt,
    and the teacher reads its ids.

    Raises:
        DataError: they differ; the message says in what.
    """
    advice = "let teacher and student share one tokenizer, or set distill.cross_tokenizer: true"
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        moved = sorted((token for token in mine if theirs.get(token) != mine[token]), key=mine.__getitem__)
        moved = moved or sorted(theirs.keys() - mine.keys(), key=theirs.__getitem__)
        raise DataError(
            f"the tokenizers differ: {len(mine)} tokens (student) and {len(theirs)} (teacher), first difference "
            f"{moved[0]!r}: id {mine.get(moved[0])} and {theirs.get(moved[0])}; {advice}"
        )
    cut_mine, cut_theirs = (each(PROBE, add_special_tokens=False)["input_ids"] for each in (student, teacher))
    if cut_mine != cut_theirs:
        raise DataError(
            f"the tokenizers have the same vocabulary but cut text differently: {PROBE[:27]!r}.. is {len(cut_mine)} "
            f"tokens for the student and {len(cut_theirs)} for the teacher; {advice}"
        )
