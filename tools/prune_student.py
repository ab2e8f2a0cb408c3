"""A student narrower and shallower than its teacher: a Hugging Face model, pruned, then repaired on its own text.

    python tools/prune_student.py models/smollm2-135m-instruct models/smollm2-w384-20-layers --width 384 --layers 20 \\
        --calibration examples/data/quickstart_train.jsonl --heal-steps 60

 1. Text: the teacher answers the calibration prompts. All that follows is measured on prompts and answers.
 2. Depth: the first layer, the last, and those of largest mean 1 - cos(input, output) stay (ShortGPT, Men et al. 2024).
 3. Width: one basis Q [teacher's width, width] for the whole stream, the main directions of the teacher's normalised
    states (SliceGPT, Ashkboos et al. 2024, with one Q instead of one a layer). The student's state stands for Q^T h.
 4. In a layer, the groups (a KV head with its query heads) stay that add most to the stream, and the MLP channels of
    the largest mean |activation| x length of the column that writes it.
 5. Repair without gradients, from the bottom up: a layer reads the best linear estimate of the teacher's normalised
    state from the student's, and writes what brings the student's state closest to Q^T h. Both are ridge regressions
    that leave exact weights alone: a student of the teacher's shape is the teacher, rotated.
 6. Healing (--heal-steps): AdamW on KL(teacher || student) over the answers, 8 a step.

The student is a plain model of the teacher's family. Matrices take in the weights of the norms they read, which a head
tied to the embedding cannot do: the student's head is its own. fp32 on CPU, one process; memory holds both models (while
healing 3 more students) and, for every token of text, a state of each and one layer's activations. Equal arguments give
equal weights on one machine and number of threads. Layers count from 1. `oprd eval` measures the result.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, rms_norm
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from checkpoints_conversion import Architecture, check_model
from checkpoints_conversion.formats import copy_companions
from oprd_megatron.config.rollout import PromptsConfig
from oprd_megatron.entry import quiet_libraries
from oprd_megatron.errors import CheckpointError, ConfigError, UserError
from oprd_megatron.rollout import HFEngine, SamplingParams, load_prompts, make_requests

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BATCH_SIZE, DECODED_AT_ONCE = 8, 48
RIDGE = 0.1
"""Of the mean square of the regressors. With 80 texts for the student above, 0.01 gave 0.17 nats more."""


class Batch(NamedTuple):
    """Texts padded on the right (under causal attention that changes nothing before it), all [B, S]."""

    ids: Tensor
    real: Tensor  # not padding
    answer: Tensor  # the next token is one of the answer's


class Ridge:
    """Regression Y = X W^T with a penalty on the distance of W [O, I] from a prior; rows of X and Y come in portions.
    The errors of the prior are summed, not the targets: where it is exact they are zero, and so is the correction."""

    def __init__(self, prior: Tensor) -> None:
        self.prior = prior
        self.gram = torch.zeros(prior.shape[1], prior.shape[1], dtype=torch.float64)
        self.errors = torch.zeros(prior.shape, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self.gram += inputs.T @ inputs
        self.errors += (targets - inputs @ self.prior.T).T @ inputs

    def solve(self) -> Tensor:
        damping = RIDGE * self.gram.diagonal().mean() * torch.eye(len(self.gram), dtype=torch.float64)
        return self.prior + torch.linalg.solve(self.gram + damping, self.errors.T).T.float()


def prune_student(options: Namespace) -> None:
    """Write the student to `options.out_dir`, through `<out_dir>.tmp`; UserError for whatever cannot be used."""
    source, out_dir = options.source, options.out_dir
    if out_dir.exists():
        raise CheckpointError(f"{out_dir}: exists already; remove it or name another directory")
    arch = check_model(source)
    shape = student_shape(arch, options)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
    text = teacher_text(teacher, options)
    student, kept, answers = build_student(teacher, arch, shape, text)
    if options.heal_steps > 0:
        heal(student, teacher.lm_head.weight, text, answers, options)
    staging = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy_companions(source, staging)
    student.save_pretrained(staging)
    origin = {"source": str(source.resolve()), "layers": dict(enumerate(kept, start=1))}
    (staging / "layer_origin.json").write_text(json.dumps(origin, indent=2) + "\n")
    check_model(staging)
    staging.rename(out_dir)
    print(f"{out_dir}: {shape}, the teacher's layers {kept}")


def student_shape(arch: Architecture, options: Namespace) -> dict[str, int]:
    """The shape asked for, by its names in config.json; what is not given follows the width in proportion, in whole
    groups. ConfigError if it is not a smaller model of the same kind."""
    if arch.family not in FAMILIES:
        raise ConfigError(f"{options.source}: {arch.family} models are not supported, only {', '.join(FAMILIES)}")
    share, ratio = options.width / arch.hidden_size, arch.heads_per_group
    groups = options.kv_heads or (options.heads or 0) // ratio or max(1, round(share * arch.num_query_groups))
    heads, ffn = options.heads or groups * ratio, options.ffn or max(1, round(share * arch.ffn_hidden_size))
    parts = {  # flag: (name in config.json, value, smallest, largest)
        "--width": ("hidden_size", options.width, 1, arch.hidden_size),
        "--layers": ("num_hidden_layers", options.layers, 2, arch.num_layers),
        "--heads": ("num_attention_heads", heads, ratio, arch.num_attention_heads),
        "--kv-heads": ("num_key_value_heads", groups, 1, arch.num_query_groups),
        "--ffn": ("intermediate_size", ffn, 1, arch.ffn_hidden_size),
    }
    for flag, (_, value, least, most) in parts.items():
        if not least <= value <= most:
            raise ConfigError(f"{flag} {value}: this teacher allows {least} to {most}")
    if heads != groups * ratio:
        raise ConfigError(f"--heads {heads}: a KV head keeps its {ratio} query heads; {groups} take {groups * ratio}")
    if all(value == most for _, value, _, most in parts.values()):
        raise ConfigError(f"--width {options.width} --layers {options.layers}: the teacher's own shape; lower one")
    return {name: value for name, value, _, _ in parts.values()}


def teacher_text(teacher: PreTrainedModel, options: Namespace) -> list[Batch]:
    """The teacher's sampled answers to the calibration prompts, short texts first."""
    engine = HFEngine(options.source, torch.float32, "cpu", DECODED_AT_ONCE)
    engine.update_weights(0, teacher.named_parameters())  # a tied head is not among them
    config = PromptsConfig(path=options.calibration, chat_template=engine.tokenizer.chat_template is not None)
    requests = make_requests(load_prompts(config, engine.tokenizer), options.answers)
    requests.sort(key=lambda request: len(request.prompt.token_ids))
    sampling = SamplingParams(max_response_tokens=options.answer_tokens, seed=options.seed)
    starts = tqdm(range(0, len(requests), DECODED_AT_ONCE), desc="the teacher answers", unit="batch")
    portions = [engine.generate(requests[start : start + DECODED_AT_ONCE], sampling, 0) for start in starts]
    texts = [(rollout.prompt_ids, rollout.response_ids) for rollouts in portions for rollout in rollouts]
    texts.sort(key=lambda text: sum(map(len, text)))
    return [make_batch(texts[first : first + BATCH_SIZE]) for first in range(0, len(texts), BATCH_SIZE)]


def make_batch(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """(prompt, answer) pairs of token ids as one batch."""
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in texts]
    ids, starts = nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([[len(text[0])] for text in texts])
    places, ends = torch.arange(ids.shape[1]), torch.tensor([[len(row)] for row in rows])
    return Batch(ids, places < ends, (places >= starts - 1) & (places < ends - 1))


@torch.no_grad()
def build_student(
    teacher: PreTrainedModel, arch: Architecture, shape: dict[str, int], text: list[Batch]
) -> tuple[PreTrainedModel, list[int], list[Tensor]]:
    """Steps 2 to 5: the student, the teacher's layers that it has, and for each batch the teacher's final states of the
    answer [N, teacher's width], as its head reads them."""
    influence, moments = survey(teacher, text[::4])  # depth and basis need less text than the regressions
    kept = [1, *sorted((influence[1:-1].topk(shape["num_hidden_layers"] - 2).indices + 2).tolist()), arch.num_layers]
    read = [layer - 1 for layer in kept] + [arch.num_layers]
    basis = torch.linalg.eigh(moments[read].sum(0)).eigenvectors.flip(1)[:, : shape["hidden_size"]].float()
    config = copy.deepcopy(teacher.config)
    config.update(shape | {"head_dim": arch.head_dim, "tie_word_embeddings": False})
    if (kinds := config.to_dict().get("layer_types")) is not None:
        config.layer_types = [kinds[layer - 1] for layer in kept]
    if (full := config.to_dict().get("max_window_layers")) is not None:
        config.max_window_layers = sum(layer <= full for layer in kept)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    student.generation_config = teacher.generation_config
    states = Repair(teacher, student, basis, text).run(kept)
    return student, kept, [teacher.model.norm(state)[b.answer] for state, b in zip(states, text, strict=True)]


def survey(teacher: PreTrainedModel, text: list[Batch]) -> tuple[Tensor, Tensor]:
    """How much each layer turns its input, [layers], and the second moments [layers + 1, width, width] of the
    normalised states before each layer and after the last."""
    num_layers, width, eps = len(teacher.model.layers), teacher.config.hidden_size, teacher.config.rms_norm_eps
    influence = torch.zeros(num_layers, dtype=torch.float64)
    moments = torch.zeros(num_layers + 1, width, width, dtype=torch.float64)
    for batch in tqdm(text, desc="surveying the layers", unit="batch"):
        states = [teacher.model.embed_tokens(batch.ids)]
        for index, layer in enumerate(teacher.model.layers):
            states.append(layer(states[-1], **_context(teacher, layer, batch)))
            influence[index] += (1 - cosine_similarity(states[-2], states[-1], dim=-1))[batch.real].sum()
        for index, state in enumerate(states):
            rows = rms_norm(state, (width,), eps=eps)[batch.real]
            moments[index] += rows.T @ rows
    return influence, moments


class Repair:
    """Fills the student from the bottom up and carries both models' states of the whole text along, [B, S, width] a
    batch. Every token counts equally, whatever the size of its state."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, basis: Tensor, text: list[Batch]) -> None:
        self.teacher, self.student, self.basis, self.text = teacher, student, basis, text
        self.eps, self.groups = teacher.config.rms_norm_eps, teacher.config.num_key_value_heads
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight @ basis)
        self.theirs = [teacher.model.embed_tokens(batch.ids) for batch in text]
        self.ours = [student.model.embed_tokens(batch.ids) for batch in text]

    def run(self, kept: list[int]) -> list[Tensor]:
        """All layers, the final norm and the head; returns the teacher's states after its last layer."""
        students = iter(self.student.model.layers)
        for number, layer in enumerate(tqdm(self.teacher.model.layers, desc="repairing", unit="layer"), start=1):
            if number in kept:
                new = next(students)
                self._attention(layer, new)
                self._mlp(layer, new)
            else:
                pairs = zip(self.theirs, self.text, strict=True)
                self.theirs = [layer(states, **_context(self.teacher, layer, b)) for states, b in pairs]
        reader = self._reader(self.teacher.model.norm, self.student.model.norm)
        self.student.lm_head.weight.copy_(self.teacher.lm_head.weight @ reader)
        return self.theirs

    def _reader(self, norm: Any, new_norm: Any) -> Tensor:
        """[teacher's width, width], to multiply the matrices that read `norm` with; sets the student's norm."""
        pairs = []
        for ours, theirs, batch in zip(self.ours, self.theirs, self.text, strict=True):
            pairs.append([rms_norm(x, x.shape[-1:], eps=self.eps)[batch.real] for x in (ours, theirs)])
        scale = sum((y @ self.basis * x).sum() for x, y in pairs) / sum(x.square().sum() for x, _ in pairs)
        fit = Ridge(self.basis * scale)
        for inputs, targets in pairs:
            fit.add(inputs, targets)
        new_norm.weight.fill_(scale)
        return norm.weight[:, None] * fit.solve() / scale

    def _writer(self, linear: Any, new: Any, kept: Tensor, inputs: list[Tensor]) -> None:
        """Fit what writes `inputs` to the stream, and write it. The teacher's states are already those after it."""
        fit = Ridge(self.basis.T @ linear.weight[:, kept])
        for rows, theirs, ours, batch in zip(inputs, self.theirs, self.ours, self.text, strict=True):
            size = theirs.norm(dim=-1, keepdim=True)
            fit.add((rows / size)[batch.real], ((theirs @ self.basis - ours) / size)[batch.real])
        new.weight.copy_(fit.solve())
        self.ours = [ours + new(rows) for ours, rows in zip(self.ours, inputs, strict=True)]

    def _attention(self, layer: Any, new: Any) -> None:
        old, fresh = layer.self_attn, new.self_attn
        reader = self._reader(layer.input_layernorm, new.input_layernorm)
        written, columns = torch.zeros(self.groups), old.o_proj.weight.chunk(self.groups, dim=1)
        for place, batch in enumerate(self.text):
            heads = self._heads(self.teacher, layer, self.theirs[place], batch)
            self.theirs[place] = self.theirs[place] + old.o_proj(heads)
            parts = (heads / self.theirs[place].norm(dim=-1, keepdim=True))[batch.real].chunk(self.groups, dim=-1)
            written += torch.stack([(x @ w.T).square().sum() for x, w in zip(parts, columns, strict=True)])
        groups = written.topk(self.student.config.num_key_value_heads).indices.sort().values
        for name in ("k_proj", "v_proj", "q_proj"):  # last the one whose rows are o_proj's columns
            linear = old.get_submodule(name)
            kept = torch.arange(linear.out_features).view(self.groups, -1)[groups].flatten()
            _copy_rows(linear, fresh.get_submodule(name), kept, reader)
        norms = {name: value for name, value in old.state_dict().items() if name in ("q_norm.weight", "k_norm.weight")}
        fresh.load_state_dict(norms, strict=False)
        inputs = [self._heads(self.student, new, ours, b) for ours, b in zip(self.ours, self.text, strict=True)]
        self._writer(old.o_proj, fresh.o_proj, kept, inputs)

    def _mlp(self, layer: Any, new: Any) -> None:
        old, fresh = layer.mlp, new.mlp
        reader = self._reader(layer.post_attention_layernorm, new.post_attention_layernorm)
        activity = torch.zeros(old.down_proj.in_features)
        for place, batch in enumerate(self.text):
            channels, size = _channels(layer, self.theirs[place]), self.theirs[place].norm(dim=-1, keepdim=True)
            activity += (channels / size)[batch.real].abs().sum(0)
            self.theirs[place] = self.theirs[place] + old.down_proj(channels)
        score = activity * old.down_proj.weight.norm(dim=0)
        rows = score.topk(fresh.down_proj.in_features).indices.sort().values
        _copy_rows(old.gate_proj, fresh.gate_proj, rows, reader)
        _copy_rows(old.up_proj, fresh.up_proj, rows, reader)
        self._writer(old.down_proj, fresh.down_proj, rows, [_channels(new, ours) for ours in self.ours])

    def _heads(self, model: PreTrainedModel, layer: Any, states: Tensor, batch: Batch) -> Tensor:
        """What o_proj reads, [B, S, heads * head_dim]."""
        seen: list[Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer.self_attn(layer.input_layernorm(states), **_context(model, layer, batch))
        hook.remove()
        return seen[0]


def _channels(layer: Any, states: Tensor) -> Tensor:
    """What down_proj reads, [B, S, ffn]."""
    normed = layer.post_attention_layernorm(states)
    return layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)


def heal(student: PreTrainedModel, head: Tensor, text: list[Batch], answers: list[Tensor], options: Namespace) -> None:
    """Step 6; `head` [V, teacher's width] makes the teacher's logits of its final states `answers`."""
    steps, generator = options.heal_steps, torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
    rates = [min(20 * (step + 1) / steps, 0.55 + 0.45 * math.cos(math.pi * step / steps)) for step in range(steps)]
    epochs = [torch.randperm(len(text), generator=generator) for _ in range(0, steps, len(text))]
    bar = tqdm(zip(rates, torch.cat(epochs).tolist(), strict=False), desc="healing", unit="step", total=steps)
    for rate, place in bar:
        optimizer.param_groups[0]["lr"] = rate * options.lr
        expected = (answers[place] @ head.T).log_softmax(-1)
        states = student.model(text[place].ids, use_cache=False).last_hidden_state[text[place].answer]
        loss = kl_div(student.lm_head(states).log_softmax(-1), expected, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(kl=f"{loss.item():.3f}")


def _context(model: PreTrainedModel, layer: Any, batch: Batch) -> dict[str, Any]:
    """A layer's other arguments: rotary angles, and the causal mask with the window that Mistral has."""
    config, places = model.config.to_dict(), torch.arange(batch.ids.shape[1])
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    windowed = kinds[layer.self_attn.layer_idx] == "sliding_attention" and config.get("sliding_window")
    gaps = places[:, None] - places
    seen = ((gaps >= 0) & (gaps < (windowed or len(places))))[None, None]
    return {"position_embeddings": model.model.rotary_emb(model.lm_head.weight, places[None]), "attention_mask": seen}


def _copy_rows(linear: nn.Linear, new: nn.Linear, rows: Tensor, reader: Tensor) -> None:
    new.weight.copy_(linear.weight[rows] @ reader)
    if linear.bias is not None:
        new.bias.copy_(linear.bias[rows])


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when the student is written, 2 for a user's mistake."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("source", type=Path, help="Hugging Face directory of the teacher")
    add("out_dir", type=Path, help="directory to write; must not exist")
    add("--width", type=int, required=True, help="of the student's stream")
    add("--layers", type=int, required=True, help="of the student, at least 2")
    add("--heads", type=int, help="query heads, whole groups; default in proportion to the width")
    add("--kv-heads", type=int, help="KV heads; default in proportion to the width")
    add("--ffn", type=int, help="width of the MLPs; default in proportion to the width")
    add("--calibration", type=Path, required=True, help="prompts that the teacher answers: .jsonl, .json or .parquet")
    add("--answers", type=int, default=1, help="of the teacher to each prompt (default 1)")
    add("--answer-tokens", type=int, default=64, help="answers are cut here (default 64)")
    add("--heal-steps", type=int, default=0, help="batches of 8 answers to train on (default 0)")
    add("--lr", type=float, default=1e-4, help="largest learning rate of the healing (default 1e-4)")
    add("--seed", type=int, default=1234, help="of the sampling and the order of the batches (default 1234)")
    options = parser.parse_args(arguments)
    quiet_libraries()
    try:
        prune_student(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
