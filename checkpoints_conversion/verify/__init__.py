"""`oprd convert verify A B`: are two models the same, and do they compute the same?

A bitwise round trip proves nothing about the config: a wrong rotary base leaves all tensors equal and the model useless. So
three things are compared, each by itself:

    architecture    what the two configs say, what a checkpoint's own settings say, the tokenizers
    tensors         every value, in blocks of a few MiB
    meaning         the hidden states after every layer and the logits of a few prompts, a layer's weights at a time

Layers of the package, each importing only those above it:
    sides           a path opened: its architecture and its tensors
    architectures   fields, settings and tokenizers
    tensors         values
    states          how two arrays of hidden states or logits differ; where the first side's wait for the second's
    prompts         what the models read
    streaming       modules that get their weights for the length of a call
    transformers_side, megatron_side    a model run with them
    report          everything that was found, the verdict, and both as text
    run             the whole
"""

from checkpoints_conversion.verify.report import Report, report_text
from checkpoints_conversion.verify.run import VerifyOptions, verify

__all__ = ["Report", "VerifyOptions", "report_text", "verify"]
