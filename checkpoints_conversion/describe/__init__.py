"""`oprd convert inspect DIR`: what is this, is it whole, and what is in it?

    description     what can be said, and as text
    contents        a Hugging Face model, or a Megatron checkpoint
    tokenizers      what its tokenizer files say
    unfinished      a conversion that was interrupted: what is done, how to go on
    checksums       every byte of the weights against what was written

No torch and no transformers: it answers in less than a second, whatever the size of the model.
"""

from checkpoints_conversion.describe.checksums import check_checksums
from checkpoints_conversion.describe.contents import describe
from checkpoints_conversion.describe.description import Description, description_text

__all__ = ["Description", "check_checksums", "describe", "description_text"]
