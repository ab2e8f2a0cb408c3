"""Prompts in, the student's own text out: prompt files, tokenizer checks and the engines that write the rollouts."""

from oprd_megatron.rollout.engine import Request, Rollout, RolloutEngine, SamplingParams, make_requests
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.rollout.prompts import Prompt, PromptSource, load_prompts, prompt_order, refuse_overlap
from oprd_megatron.rollout.tokenizer import check_same_tokenizer, check_tokenizer, load_tokenizer

__all__ = [
    "HFEngine",
    "Prompt",
    "PromptSource",
    "Request",
    "Rollout",
    "RolloutEngine",
    "SamplingParams",
    "check_same_tokenizer",
    "check_tokenizer",
    "load_prompts",
    "load_tokenizer",
    "make_requests",
    "prompt_order",
    "refuse_overlap",
]
