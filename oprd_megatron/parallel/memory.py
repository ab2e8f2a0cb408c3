"""What a rank has to hold, from config.json and a layout: weights, gradients and optimizer exactly, activations estimated.

Weights, gradients, optimizer. The sizes are those of the conversion tables' local parameters: vocabulary padded so that each
rank's share is a multiple of 128, heads padded to divide by tp, tied embeddings once on a single stage and twice (first and
last stage) on more. With N numbers on a rank, N' of them trained, and a dtype of e bytes:

    weights    e N
    gradients  4 N'                mcore's DDP accumulates in fp32 (`main_grad`)
    optimizer  (8 + [bf16] 4) N'   two fp32 Adam moments, and an fp32 master copy of bf16 weights

The teacher is frozen: weights only, those of its linear layers in a byte and their scales if they are in fp8 (`precision`), and
no head where neither an output term nor an evaluation looks at its predictions. Frozen, too, is an untied head of the student
that no output term reaches (optimizer.py): it is in N, not in N'. A student that computes in fp8 keeps its weights as they are;
what Transformer Engine casts for a step is not counted.
Trained maps of `distill.mode: linear` are in both, whole on every tensor-parallel rank. mcore's distributed optimizer
keeps the trained weights and their gradients of each chunk in buffers in which every parameter starts at a multiple of 64
numbers and which end at a multiple of lcm(dp * cp, 128); a tied embedding of a pipeline has one of its own. A rank's share of
the optimizer is 1 / (dp * cp) of them, at most (mcore 0.16.1, distributed/param_and_grad_buffer.py).

Activations. The accounting of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(arXiv 2205.05198), section 4, with this project's layer in place of GPT's. There a layer keeps s b h (10 + 24 / t +
5 a s / (h t)) bytes, s b h (34 + 5 a s / h) / t with sequence parallelism; flash attention, like selective recomputation, drops
the term with a s / h. Here, in numbers per token of the pack on this rank (width D, feed-forward F, n query heads and g
key/value heads of H, no dropout, SwiGLU not fused):

    4 D / (t if sequence parallel else 1)    both norms' inputs and outputs; + 2 D for the inputs of Gemma's other two
    (2 n + 2 g) H / t                        query, key, value and attention output; + (n + g) H / t before Qwen3's norms
    4 F / t                                  gate and up, silu(gate), their product
    k (D + 5 F / t) + 2 E / (as D above)     instead, of k of E experts: their input, the same and the weighted product; the
                                             router. t times the first without sequence parallelism (a frozen teacher)

Recomputation `full` keeps one D for each group of layers (uniform) or each of the first layers (block) instead, and once the
layers being recomputed. A chunk's own output counts D, the final norm D more; the logits of output terms, which exist a few
tokens at a time, are counted in planning/output_memory.py. How many
micro-batches a stage holds follows from the schedule: min(m, pp - stage) under 1F1B, and counted off mcore's interleaved order
with virtual stages. The teacher has one layer's worth at a time. Kernel workspaces, communication buffers and the CUDA context
(usually a few GB) are not in it.

How far off. tests/parallel/test_memory.py compares with what autograd saves in tiny models on gloo ranks, where the local
layers are not fused: their norms keep x / rms (and fp32 copies under bf16), their attention the whole qkv block, repeated keys
and values and its output twice. With those terms added, measured over estimated is 0.85 to 1.15 in every layout, schedule and
recomputation; without them 1.2 to 1.6 in fp32 and up to 2 in bf16 (at Qwen2.5-7B's shape they add 22 % and 51 %), up to 3 with
Gemma's four norms a layer. Transformer Engine keeps none of them, but that has not been measured on a GPU yet.

No process groups and no mcore here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from checkpoints_conversion import Architecture, Sharding, mappings_for
from checkpoints_conversion.architecture import VOCAB_MULTIPLE
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.parallel.precision import kept_layers, weight_bytes

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = MASTER_BYTES = 4
MOMENTS_BYTES = 8
HEAD = "output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class StageMemory:
    """What a rank of one stage of one model holds.

    Attributes:
        parameters: numbers.
        weights, gradients, optimizer: bytes, exact (the optimizer's share is the largest rank's, at most).
        activations: bytes, estimated.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def states(self) -> int:
        """Bytes that stay for the whole run."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.states + self.activations


@dataclass(frozen=True)
class ModelMemory:
    """One model on its grid.

    Attributes:
        architecture: from config.json.
        layout: the grid.
        dtype: of weights and activations.
        vocab_size: the vocabulary is padded as for this many ids, if that is more than the model's own.
        trained: False for the teacher.
        distributed: mcore's distributed optimizer.
        recompute: of activations.
        trains_head: an untied head is trained too: there are output terms.
        state_maps: {student layer: numbers of its trained map}.
        precision: of the linear layers.
        has_head: False where nothing looks at what a teacher predicts, and its head is left out.
    """

    architecture: Architecture
    layout: GridLayout
    dtype: str
    vocab_size: int
    trained: bool
    distributed: bool = False
    recompute: RecomputeConfig = RecomputeConfig()  # noqa: RUF009 (frozen)
    trains_head: bool = False
    state_maps: Mapping[int, int] = field(default_factory=dict)
    precision: PrecisionConfig = PrecisionConfig()  # noqa: RUF009 (frozen)
    has_head: bool = True

    @property
    def sharding(self) -> Sharding:
        """Padded sizes; those of every tensor-parallel rank are equal."""
        padded = replace(self.architecture, vocab_size=max(self.vocab_size, self.architecture.vocab_size))
        return Sharding.smallest(padded, 0, self.layout.tp, vocab_multiple=VOCAB_MULTIPLE)

    def stages(self, tokens: int, micro_batches: int) -> list[StageMemory]:
        """Every stage's figures.

        Args:
            tokens: of the longest pack, over all context-parallel ranks.
            micro_batches: that a data-parallel rank does in one pass through the pipeline.
        """
        sizes = self._sizes()
        return [self._stage(stage, sizes, tokens, micro_batches) for stage in range(self.layout.pp)]

    def chunk_parameters(self, stage: int, chunk: int) -> dict[str, int]:
        """{Megatron name (global layer index): numbers on a rank} of one chunk; a map's is state_maps.<layer>.weight."""
        return self._chunk(self._sizes(), stage, chunk)

    @property
    def head_numbers(self) -> int:
        """Of the head on a rank of the last stage, tied or not."""
        return self._sizes()[HEAD]

    @property
    def _frozen(self) -> set[str]:
        """Parameters of a trained model that no loss reaches."""
        return set() if self.trains_head or self.architecture.tie_word_embeddings else {HEAD}

    def _sizes(self) -> dict[str, int]:
        sharding = self.sharding
        return {
            name: math.prod(mapping.megatron_shape(sharding))
            for name, mapping in mappings_for(self.architecture).items()
        }

    def _chunk(self, sizes: dict[str, int], stage: int, chunk: int) -> dict[str, int]:
        layout = self.layout
        first = stage == 0 and chunk == 0
        last = stage == layout.pp - 1 and chunk == layout.vpp - 1
        layers = {str(layer - 1) for layer in layout.chunk_layers(stage, chunk)}
        found = {}
        for name, size in sizes.items():
            if name.startswith("decoder.layers."):
                here = name.split(".")[2] in layers
            elif name == HEAD:
                here = self.has_head and last and not (first and self.architecture.tie_word_embeddings)
            else:
                here = first if name == EMBEDDING else last
            if here:
                found[name] = size
        maps = {
            layer: self.state_maps[layer] for layer in layout.chunk_layers(stage, chunk) if layer in self.state_maps
        }
        return found | {f"state_maps.{layer}.weight": size for layer, size in maps.items()}

    def _stage(self, stage: int, sizes: dict[str, int], tokens: int, micro_batches: int) -> StageMemory:
        chunks = [self._chunk(sizes, stage, chunk) for chunk in range(self.layout.vpp)]
        parameters = sum(sum(chunk.values()) for chunk in chunks)
        itemsize = DTYPE_BYTES[self.dtype]
        activations = self.activations(stage, tokens, micro_batches)
        if not self.trained:
            return StageMemory(parameters, sum(map(self.frozen_bytes, chunks)), 0, 0, activations)
        frozen = sum(chunk.get(name, 0) for chunk in chunks for name in self._frozen)
        trained, share = parameters - frozen, 1
        if self.distributed:
            trained, share = sum(self._buffer(chunk) for chunk in chunks), self.layout.dp * self.layout.cp
        per_number = MOMENTS_BYTES + (MASTER_BYTES if self.dtype == "bf16" else 0)
        return StageMemory(
            parameters,
            weights=(trained + frozen) * itemsize,
            gradients=trained * GRADIENT_BYTES,
            optimizer=trained // share * per_number,
            activations=activations,
        )

    def frozen_bytes(self, chunk: Mapping[str, int]) -> int:
        """Bytes of a frozen model's parameters, {name: numbers}, as they are stored."""
        kept, itemsize = kept_layers(self.precision, self.architecture.num_layers), DTYPE_BYTES[self.dtype]
        return round(
            sum(n * weight_bytes(name, self.precision, kept, itemsize, frozen=True) for name, n in chunk.items())
        )

    def _buffer(self, chunk: dict[str, int]) -> int:
        """Numbers in the distributed optimizer's buffer of a chunk, padding included."""
        tied = self.architecture.tie_word_embeddings
        alone = {EMBEDDING, HEAD} if tied and self.layout.pp > 1 else set()
        buckets = [[size] for name, size in chunk.items() if name in alone]
        buckets.append([size for name, size in chunk.items() if name not in alone | self._frozen])
        end = math.lcm(self.layout.dp * self.layout.cp, 128)
        return sum(_round_up(sum(_round_up(size, 64) for size in bucket), end) for bucket in buckets)

    def activations(self, stage: int, tokens: int, micro_batches: int) -> int:
        """Bytes of activations on a rank of a stage; arguments as in `stages`."""
        layout, itemsize = self.layout, DTYPE_BYTES[self.dtype]
        tokens_local = -(-tokens // layout.cp)
        width = self.architecture.hidden_size / (layout.tp if layout.sp else 1)
        layer = self.layer_numbers()
        if not self.trained:
            return round((layer + width) * tokens_local * itemsize)
        how, full = self.recompute, self.recompute.granularity == "full"
        kept, again = [], 0.0
        for chunk in range(layout.vpp):
            count = len(layout.chunk_layers(stage, chunk))
            is_last = stage == layout.pp - 1 and chunk == layout.vpp - 1
            inputs = min(count, how.num_layers) if how.method == "block" else -(-count // how.num_layers)
            whole = count - inputs if how.method == "block" else 0
            held = inputs * width + whole * layer if full else count * layer
            kept.append(held + width * (2 if is_last else 1))
            if full:
                again = max(again, layer * (1 if how.method == "block" else min(count, how.num_layers)))
        peak = peak_in_flight(kept, layout.pp, stage, micro_batches)
        return round((peak + again) * tokens_local * itemsize)

    def layer_numbers(self) -> float:
        """Numbers that a layer keeps for each token of this rank's share."""
        architecture, layout = self.architecture, self.layout
        groups = self.sharding.num_query_groups_padded / layout.tp
        heads = groups * architecture.heads_per_group
        attention = (2 * heads + 2 * groups) * architecture.head_dim
        if architecture.qk_norm:
            attention += (heads + groups) * architecture.head_dim
        shards = layout.tp if layout.sp else 1
        norms = (6 if architecture.sandwich_norm else 4) * architecture.hidden_size / shards
        return norms + attention + self._mlp_numbers(shards)

    def _mlp_numbers(self, shards: int) -> float:
        """The MLP's or the experts' part of `layer_numbers`; `shards` of the tokens outside it."""
        architecture, tp = self.architecture, self.layout.tp
        features, experts = architecture.ffn_hidden_size / tp, architecture.experts
        if experts is None:
            return 4 * features
        copies = experts.top_k * tp / shards
        return copies * (architecture.hidden_size + 5 * features) + 2 * experts.num_experts / shards


def peak_in_flight(kept: Sequence[float], pp: int, stage: int, micro_batches: int) -> float:
    """Most that a stage holds at a time under mcore's schedules, if chunk c keeps kept[c] from a micro-batch's forward to its
    backward."""
    chunks = len(kept)
    if chunks == 1:
        return kept[0] * min(micro_batches, pp - stage)
    total = micro_batches * chunks
    ahead = min(total, 2 * (pp - stage - 1) + (chunks - 1) * pp)
    held = peak = 0.0
    for number in range(total):
        held += kept[number % (pp * chunks) // pp]
        peak = max(peak, held)
        if number >= ahead:
            held -= kept[chunks - 1 - (number - ahead) % (pp * chunks) // pp]
    return peak


def peak_spooled(sizes: Sequence[int], budget: int | None, teaches: bool, learns: bool) -> int:
    """Most bytes of teacher states and outputs that a rank holds, for chunks of these sizes (see representation/spool.py).

    Both models: one chunk at a time. The teacher alone keeps what it sent until a later chunk needs the room; the student
    alone opens following chunks while they fit.
    """
    if teaches and learns:
        return max(sizes, default=0)
    peak, first, stop = 0, 0, 0
    for number in range(len(sizes)):
        stop = max(stop, number + 1)
        if learns:
            first = number
            while stop < len(sizes) and (budget is None or sum(sizes[first : stop + 1]) <= budget):
                stop += 1
        else:
            while first < number and budget is not None and sum(sizes[first:stop]) > budget:
                first += 1
        peak = max(peak, sum(sizes[first:stop]))
    return peak


def engine_bytes(architecture: Architecture, dtype: str) -> int:
    """A whole copy of a model as the rollout engine holds it: unsharded and unpadded, without its key/value cache."""
    rows = (mapping for mapping in mappings_for(architecture).values() if mapping.exported)
    return DTYPE_BYTES[dtype] * sum(math.prod(shape) for row in rows for shape in row.hf_shapes.values())


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
