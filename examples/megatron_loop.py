"""OPRD in a training loop that somebody already has: Megatron-LM's, on megatron-core alone.

    torchrun --nproc-per-node 2 examples/megatron_loop.py --student models/smollm2-24-layers \\
        --teacher models/smollm2-135m-instruct --tp 2 --steps 3
    torchrun --nproc-per-node 2 examples/megatron_loop.py .. --pp 2 --lm-loss

The loop is the one of `megatron.training`: global parallel state, model provider, DDP, mcore's optimizer, schedule and
forward_step. The lines that OPRD needs are marked with <-- and are all there is to it. What the loop reads comes from a file of
prompts here; in on-policy distillation it is what the student has written.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoTokenizer

from checkpoints_conversion import Sharding, check_model
from checkpoints_conversion.architecture import VOCAB_MULTIPLE
from checkpoints_conversion.live.weights import load_hf_weights
from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.library import InProcessTeacher, attach, representation_step
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.platform import init_distributed, select_platform

PROMPTS = Path(__file__).parent / "data" / "quickstart_train.jsonl"


def model_provider(hf_dir: Path, tp: int, pp: int) -> GPTModel:
    """A Llama as Megatron-LM builds it, in mcore's local spec; heads that tp does not divide get zero ones beside them."""
    arch = check_model(hf_dir)
    sharding = Sharding.smallest(
        arch, parallel_state.get_tensor_model_parallel_rank(), tp, vocab_multiple=VOCAB_MULTIPLE
    )
    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=sharding.num_query_groups_padded * arch.heads_per_group,
        num_query_groups=sharding.num_query_groups_padded, kv_channels=arch.head_dim, normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon, activation_func=torch.nn.functional.silu, gated_linear_unit=True,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, use_cpu_initialization=True,
        perform_initialization=True, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        calculate_per_token_loss=True, batch_p2p_comm=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), sharding.vocab_size_padded, arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tie_word_embeddings, position_embedding_type="rope",
        rotary_base=arch.rotary_base,
    )  # fmt: skip
    load_hf_weights([model], hf_dir, sharding, arch)
    return model


def batches(hf_dir: Path, micro_batch_size: int, seq_length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches as Megatron-LM's GPT datasets give them: tokens, labels, loss_mask, position_ids, each [B, S]."""
    tokenizer = AutoTokenizer.from_pretrained(hf_dir)
    text = tokenizer("\n".join(json.loads(line)["prompt"] for line in PROMPTS.open()))["input_ids"]
    rows = len(text) // (seq_length + 1)
    ids = torch.tensor(text[: rows * (seq_length + 1)]).view(rows, seq_length + 1)
    positions = torch.arange(seq_length).expand(micro_batch_size, seq_length)
    for start in itertools.cycle(range(0, rows - micro_batch_size + 1, micro_batch_size)):
        chosen = ids[start : start + micro_batch_size]
        mask = torch.ones(micro_batch_size, seq_length)
        yield {"tokens": chosen[:, :-1], "labels": chosen[:, 1:], "loss_mask": mask, "position_ids": positions}


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Megatron-LM's: (sum of losses, tokens, what is logged)."""
    loss, tokens = (output.flatten() * loss_mask.flatten()).sum(), loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def get_inputs(data_iterator: Iterator[Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Arguments of the model, and the batch."""
    batch = next(data_iterator)
    mask = torch.ones(batch["tokens"].size(1), batch["tokens"].size(1), dtype=torch.bool).triu(1)[None, None]
    return {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "attention_mask": mask}, batch


def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Megatron-LM's, for a run that trains its own loss too."""
    inputs, batch = get_inputs(data_iterator)
    return model(**inputs, labels=batch["labels"]), partial(loss_func, batch["loss_mask"])


def main(args: argparse.Namespace) -> list[float]:
    """Train; returns each step's representation loss."""
    platform = select_platform("cpu")
    init_distributed(platform)
    parallel_state.initialize_model_parallel(args.tp, args.pp)
    with platform.scope():  # CPU ranks: answers mcore's questions about CUDA
        init_mcore_globals(1, parallel_state.get_tensor_model_parallel_rank())
        bare = model_provider(args.student, args.tp, args.pp)
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        model = DistributedDataParallel(bare.config, ddp_config, bare)
        bare.config.finalize_model_grads_func = finalize_model_grads
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr, clip_grad=1.0), [model])
        teacher = InProcessTeacher.load(  # <-- any layout of its own on these ranks
            args.teacher, ParallelConfig(tp=dist.get_world_size()), platform=platform, dtype="fp32", pad_heads=True
        )
        distill = DistillConfig(positions="all", layers="even", normalize="l2", coefficient=args.coefficient)
        oprd = attach(model, teacher, distill)  # <--
        forward_backward = oprd.around(get_forward_backward_func())  # <--
        step_func = forward_step if args.lm_loss else representation_step(oprd, lambda it: get_inputs(it)[0])  # <--
        data = batches(args.student, args.micro_batch_size, args.seq_length)
        found = []
        for step in range(args.steps):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            losses = forward_backward(
                forward_step_func=step_func, data_iterator=data, model=model, num_microbatches=args.num_microbatches,
                seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=False,
            )  # fmt: skip
            _, grad_norm, _ = optimizer.step()
            assert oprd.report is not None
            found.append(oprd.report.loss)
            if dist.get_rank() == dist.get_world_size() - 1:
                line = f"step {step + 1}: oprd loss {oprd.report.loss:.6f}, cosine {oprd.report.mean_cosine:.4f}"
                if args.lm_loss:
                    total = torch.stack([loss["lm loss"] for loss in losses]).sum(0)
                    line += f", lm loss {(total[0] / total[1]).item():.4f}"
                print(f"{line}, grad norm {grad_norm:.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="Hugging Face directory of a Llama")
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face directory; the student's tokenizer")
    defaults = {"tp": 1, "pp": 1, "steps": 3, "micro-batch-size": 2, "num-microbatches": 2, "seq-length": 32}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--coefficient", type=float, default=100.0, help="factor on the representation loss")
    parser.add_argument("--lm-loss", action="store_true", help="train the loop's own loss too")
    main(parser.parse_args())
