"""Student and teacher with different tokenizers: one text, two tokenisations, and the positions where they meet."""

from oprd_megatron.cross_tokenizer.align import UNKNOWN, align_ends, start_boundaries
from oprd_megatron.cross_tokenizer.end_of_turn import teacher_end_id
from oprd_megatron.cross_tokenizer.retokenize import Retokenized, Retokenizer, check_shared_boundaries
from oprd_megatron.cross_tokenizer.token_bytes import TokenBytes

__all__ = [
    "UNKNOWN",
    "Retokenized",
    "Retokenizer",
    "TokenBytes",
    "align_ends",
    "check_shared_boundaries",
    "start_boundaries",
    "teacher_end_id",
]
