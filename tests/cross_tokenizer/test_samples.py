"""Samples of two tokenizers: the right positions of the right texts, and every layout compares exactly those states."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_conversion import read_architecture
from oprd_megatron.config.schema import DistillConfig, OptimizerConfig, ParallelConfig
from oprd_megatron.cross_tokenizer import Retokenizer
from oprd_megatron.errors import DataError
from oprd_megatron.models import build_model
from oprd_megatron.optimizer import build_optimizer, stream_gradients
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.batch import Planner, Sample, TeacherText
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from oprd_megatron.rollout import Prompt, Rollout
from oprd_megatron.rollout.samples import SampleMaker
from tests.cross_tokenizer.cross_runs import Pair, chosen, load_models, plain_loss, tokenizer_of
from tests.cross_tokenizer.slow_reference import student_bytes
from tests.grids import random_case
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

# Positions of SampleMaker

EXACT = ("bytes", "byte_level", "gemma_like")
"""Tokenizers whose tokens' bytes, joined, are the text (without a dummy space, and without normalisation)."""
PIECES = ["the", " cats", "naïve", " ", "  ", "\n", "12", "\\frac{1}{2}", "def add(a, b):", "日本", "🙂", "é", "<eos>"]
MANY = 10**6


def spelled(kind: str, tokenizer: Any, token_id: int) -> bytes:
    """A token's share of a text."""
    return student_bytes("byte_level" if kind == "bytes" else kind, tokenizer, token_id)


def rollout(prompt: Prompt, ids: Sequence[int], writer: str) -> Rollout:
    """A response to a prompt that the student or the teacher wrote."""
    read = prompt.token_ids if writer == "student" else prompt.teacher_ids
    return Rollout(prompt.index, 0, read, tuple(ids), weight_version=0, finished=True)


def maker(kinds: tuple[str, str], prompts: list[Prompt], context: int = MANY, **distill: Any) -> SampleMaker:
    """A `SampleMaker` of two kinds of tokenizers: the teacher's, the student's."""
    theirs, mine = map(tokenizer_of, kinds)
    return SampleMaker(
        prompts, DistillConfig(cross_tokenizer=True, **distill),
        to_teacher=Retokenizer(mine, theirs, [mine.eos_token_id], theirs.eos_token_id),
        to_student=Retokenizer(theirs, mine, [theirs.eos_token_id], mine.eos_token_id),
        teacher_context=context, student_context=10**6,
    )  # fmt: skip


def prefixes(kind: str, tokenizer: Any, response: Sequence[int]) -> list[bytes]:
    """What has been read before each token and after the last; an end token is one more letter, which no text has."""
    shares = [b"\xff" if token == tokenizer.eos_token_id else spelled(kind, tokenizer, token) for token in response]
    return [b"".join(shares[:count]) for count in range(len(shares) + 1)]


def expected_pairs(before: list[list[bytes]], starts: list[int], context: int, anchor: str) -> list[Pair]:
    """(teacher's, student's) sequence indices of the states that have read the same bytes of a response; of several with
    the same bytes the first for `token`, which has read a response token, and the last for `predictor`, which has one to
    predict."""
    found = []
    for text in sorted(set(before[0]) & set(before[1]), key=len):
        places = []
        for side, start in zip(before, starts, strict=True):
            counts = [count for count, read in enumerate(side) if read == text]
            if anchor == "token":
                counts = [count for count in counts if count > 0 and text]
                places.append(start + counts[0] - 1 if counts else None)
            else:
                counts = [count for count in counts if count < len(side) - 1]
                places.append(start + counts[-1] - 1 if counts else None)
        if None not in places and places[0] < context and min(places) >= 0:
            found.append((places[0], places[1]))
    return found


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
    kinds=st.tuples(st.sampled_from(EXACT), st.sampled_from(EXACT)),
    lengths=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    anchor=st.sampled_from(["token", "predictor"]),
    writer=st.sampled_from(["student", "teacher"]),
    ended=st.booleans(),
    context=st.sampled_from([MANY, MANY, 9]),
)
def test_positions_have_read_the_same_bytes(
    text: str, kinds: tuple[str, str], lengths: tuple[int, int], anchor: str, writer: str, ended: bool, context: int
) -> None:
    """Whoever wrote: paired states have read the same bytes of the response, all such states are paired, in order, and none
    lies outside what is read; counted from each model's own prompt."""
    tokenizers = [tokenizer_of(kind) for kind in kinds]
    prompt = Prompt(3, "?", tuple(range(5, 5 + lengths[1])), tuple(range(100, 100 + lengths[0])))
    which = ("teacher", "student").index(writer)
    ids = tokenizers[which](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids += [tokenizers[which].eos_token_id] * ended
    make = maker(kinds, [prompt], context, position_anchor=anchor)
    (sample,) = (make.of_student if writer == "student" else make.of_teacher)([rollout(prompt, ids, writer)])
    assert sample.teacher is not None and sample.prompt_ids == prompt.token_ids
    assert sample.teacher.ids[: lengths[0]] == prompt.teacher_ids[: len(sample.teacher.ids)]
    whole = (
        [*prompt.teacher_ids, *ids]
        if which == 0
        else [*prompt.teacher_ids, *read_by(kinds[0], tokenizers[0], text, ended)]
    )
    assert list(sample.teacher.ids) == whole[:context]
    if writer == "student":
        assert sample.response_ids == tuple(ids)
    else:
        assert sample.response_ids == tuple(read_by(kinds[1], tokenizers[1], text, ended))
    before = [
        prefixes(kinds[0], tokenizers[0], whole[lengths[0] :]),
        prefixes(kinds[1], tokenizers[1], sample.response_ids),
    ]
    expected = expected_pairs(before, [lengths[0], lengths[1]], context, anchor)
    assert list(zip(sample.teacher.teacher_positions, sample.teacher.student_positions, strict=True)) == expected
    if writer == "student":
        assert make.aligned_fraction == len(expected) / len(ids)


def read_by(kind: str, tokenizer: Any, text: str, ended: bool) -> list[int]:
    """The text as a tokenizer reads it, and its end token."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, *[tokenizer.eos_token_id] * ended]


def letters(text: str) -> list[int]:
    return tokenizer_of("bytes")(text)["input_ids"]


WORDS = [*letters("the cat"), 2]
"""Seven one-byte tokens and the end token of the student."""


def test_prompts_of_unequal_length_shift_each_side_by_its_own() -> None:
    """Prompts are found by their index, not by their place or order; the two lengths do not mix."""
    prompts = [Prompt(7, "a", (9,) * 4, (8,) * 11), Prompt(2, "b", (9,) * 6, (8,))]
    make = maker(("byte_level", "bytes"), prompts)
    teacher_tokens = tokenizer_of("byte_level")("the cat")["input_ids"]
    lengths = [len(spelled("byte_level", tokenizer_of("byte_level"), token)) for token in teacher_tokens]
    assert len(lengths) > 1 and sum(lengths) == 7
    ends = [*np.cumsum(lengths), 8]
    asked = prompts[::-1]
    samples = make.of_student([rollout(prompt, WORDS, "student") for prompt in asked])
    for prompt, sample in zip(asked, samples, strict=True):
        text = sample.teacher
        assert text.ids == (*prompt.teacher_ids, *teacher_tokens, tokenizer_of("byte_level").eos_token_id)
        assert text.student_positions == tuple(len(prompt.token_ids) + end - 1 for end in ends)
        assert text.teacher_positions == tuple(range(len(prompt.teacher_ids), len(text.ids)))
    predictor = maker(("byte_level", "bytes"), prompts, position_anchor="predictor")
    (sample,) = predictor.of_student([rollout(prompts[0], WORDS, "student")])
    assert sample.teacher.student_positions == tuple(4 + start - 1 for start in [0, *ends[:-1]])
    assert sample.teacher.teacher_positions == tuple(range(11 - 1, 11 + len(lengths)))


def test_a_teachers_context_cuts_what_it_reads() -> None:
    """Nothing past the context is read or paired; what was lost counts as not aligned."""
    prompt = Prompt(0, "a", (9,), (8,) * 5)
    whole = maker(("bytes", "bytes"), [prompt])
    assert len(whole.of_student([rollout(prompt, WORDS, "student")])[0].teacher.ids) == 13
    assert whole.aligned_fraction == 1.0
    for context, kept in ((13, 8), (12, 7), (6, 1), (5, 0), (3, 0)):
        cut = maker(("bytes", "bytes"), [prompt], context)
        (sample,) = cut.of_student([rollout(prompt, WORDS, "student")])
        assert len(sample.teacher.ids) == context
        assert sample.teacher.teacher_positions == tuple(range(5, 5 + kept))
        assert sample.teacher.student_positions == tuple(range(1, 1 + kept))
        assert cut.aligned_fraction == kept / 8
        assert cut.of_teacher([rollout(prompt, WORDS, "teacher")])[0].teacher == sample.teacher


def test_the_aligned_fraction_is_of_the_batchs_tokens() -> None:
    """It weighs tokens, not responses, starts anew with each batch, and below `min_aligned` is one line."""
    prompt = Prompt(0, "a", (9,), (8,))
    words = tokenizer_of("byte_level")("the cat")["input_ids"]
    short = letters("a")
    make = maker(("byte_level", "bytes"), [prompt], min_aligned=0.3)
    assert make.aligned_fraction is None
    batch = [rollout(prompt, WORDS, "student"), rollout(prompt, short, "student")]
    make.of_student(batch)
    fraction = (len(words) + 1 + 1) / 9
    assert make.aligned_fraction == pytest.approx(fraction) and fraction < 0.99
    make.of_student([batch[1]])
    assert make.aligned_fraction == 1.0
    exact = maker(("byte_level", "bytes"), [prompt], min_aligned=fraction)
    assert len(exact.of_student(batch)) == 2
    floor = maker(("byte_level", "bytes"), [prompt], min_aligned=round(fraction + 0.01, 6))
    with pytest.raises(DataError, match=rf"distill\.min_aligned: only {fraction:.3f} of this batch's") as caught:
        floor.of_student(batch)
    assert "\n" not in str(caught.value)


def test_one_tokenizer_gives_both_models_the_same_ids() -> None:
    """Without retokenizers a sample is the rollout, whoever wrote it, and no fraction is reported."""
    prompt = Prompt(0, "a", (9, 4))
    make = SampleMaker([prompt], DistillConfig())
    assert make.of_student([rollout(prompt, WORDS, "student")]) == [Sample((9, 4), tuple(WORDS))]
    answer = Rollout(0, 0, (9, 4), tuple(WORDS), 0, True)
    assert make.of_teacher([answer]) == [Sample((9, 4), tuple(WORDS))]
    assert make.aligned_fraction is None


# Positions and the plan

TEACHER_VOCAB, STUDENT_VOCAB = 500, 300
"""The teacher has ids that the student does not: were it fed the student's ids, or the other way round, states would differ."""


def random_samples(rng: random.Random, count: int) -> list[Sample]:
    """Two unrelated sequences of different lengths with any ascending pairs between them: none, few or all."""
    samples = []
    for number in range(count):
        prompt, response, theirs = rng.randint(1, 6), rng.randint(0, 9), rng.randint(1, 14)
        pairs = min(rng.choice([0, 1, 3, 20]), response, theirs) if number else 1
        response = max(response, pairs)
        at_student = sorted(rng.sample(range(prompt, prompt + response), pairs))
        at_teacher = sorted(rng.sample(range(theirs), pairs))
        text = TeacherText(
            tuple(rng.randrange(STUDENT_VOCAB, TEACHER_VOCAB) for _ in range(theirs)),
            tuple(at_student),
            tuple(at_teacher),
        )
        ids = [rng.randrange(STUDENT_VOCAB) for _ in range(prompt + response)]
        samples.append(Sample(tuple(ids[:prompt]), tuple(ids[prompt:]), text))
    return samples


def supervised(sample: Sample, config: DistillConfig) -> list[Pair]:
    """By hand: the (teacher's, student's) indices."""
    pairs = list(zip(sample.teacher.teacher_positions, sample.teacher.student_positions, strict=True))
    pairs = chosen(pairs, config)
    return pairs if sample.kept is None else [pairs[index] for index in sample.kept]


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"positions": "all"}, [(1, 5), (4, 6), (6, 9), (7, 11)]),
        ({"positions": "last"}, [(7, 11)]),
        ({"positions": "last_k", "k": 2}, [(6, 9), (7, 11)]),
        ({"positions": "last_k", "k": 9}, [(1, 5), (4, 6), (6, 9), (7, 11)]),
        ({"positions": "first_k", "k": 3}, [(1, 5), (4, 6), (6, 9)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("anchor", ["token", "predictor"])
def test_positions_choose_among_aligned_pairs(settings: dict[str, Any], pairs: list[Pair], anchor: str) -> None:
    """k counts aligned pairs, not tokens; the anchor is in the pairs already; `kept` picks from what is chosen."""
    config = DistillConfig(cross_tokenizer=True, position_anchor=anchor, **settings)
    sample = Sample((1,) * 5, (2,) * 8, TeacherText((3,) * 8, (5, 6, 9, 11), (1, 4, 6, 7)))
    assert list(zip(*sample.positions(config), strict=True)) == pairs
    for kept in ((), (len(pairs) - 1,), tuple(range(len(pairs)))):
        found = list(zip(*replace(sample, kept=kept).positions(config), strict=True))
        assert found == [pairs[index] for index in kept]
    none = Sample((1,), (2,), TeacherText((3,), (), ()))
    assert list(map(list, none.positions(config))) == [[], []]


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_plan_pairs_the_right_rows(rng: random.Random) -> None:
    """On any two grids, with any batching: token by token, the row of the teacher's pack holds the id at the teacher's
    position, the student's the id at the student's, and every supervised pair is planned once."""
    case = random_case(rng)
    teacher, student = case.teacher.layout, case.student.layout
    size = rng.randint(1, 2)
    tokens = rng.choice([None, 12, 30])
    unit = 1 if tokens else size * math.lcm(teacher.dp, student.dp)
    samples = random_samples(rng, unit * rng.randint(1, 3))
    config = case.config
    samples = [replace(sample, kept=tuple(range(0, len(supervised(sample, config)), 2))) if rng.random() < 0.3 else sample
               for sample in samples]  # fmt: skip
    pairs = resolve_layer_pairs(config, student.num_layers, teacher.num_layers)
    planner = Planner(pairs, teacher, student, config, 4, size, tokens)
    expected = [
        [(sample.teacher.ids[t], sample.ids[s], sample) for t, s in supervised(sample, config)] for sample in samples
    ]
    if not any(expected):
        with pytest.raises(DataError, match="no token of this batch is supervised"):
            planner.plan(samples)
        return
    plan = planner.plan(samples)
    assert plan.num_tokens == sum(map(len, expected))
    found = []
    for chunk in plan.chunks:
        ids = []
        for side, sequences in (
            (chunk.teacher, [sample.teacher.ids for sample in chunk.samples]),
            (chunk.student, [sample.ids for sample in chunk.samples]),
        ):
            packed = {}
            for dp, packs in enumerate(side.arrangement.packs):
                for number, pack in enumerate(packs):
                    for sample, start, span in zip(pack.samples, pack.boundaries, pack.spans, strict=False):
                        assert span >= len(sequences[sample])
                        packed |= {(dp, number, start + place): token for place, token in enumerate(sequences[sample])}
            places = zip(side.tokens.dp, side.tokens.micro_batch, side.tokens.row, strict=True)
            ids.append([packed[tuple(map(int, place))] for place in places])
        found += list(zip(*ids, strict=True))
    assert found == [(theirs, mine) for sample in expected for theirs, mine, _ in sample]


# Value and gradient

LAYOUTS: dict[str, tuple[ParallelConfig, ParallelConfig, int | None]] = {
    "single": (ParallelConfig(), ParallelConfig(), None),
    "packed": (ParallelConfig(), ParallelConfig(), 24),
    "tp2 > pp2": (ParallelConfig(tp=2), ParallelConfig(pp=2), None),
    "tp2sp > tp2": (ParallelConfig(tp=2, sp=True), ParallelConfig(tp=2), None),
    "dp2 > cp2": (ParallelConfig(dp=2), ParallelConfig(cp=2), None),
    "cp2 > dp2 packed": (ParallelConfig(cp=2), ParallelConfig(dp=2), 30),
    "disjoint": (ParallelConfig(ranks="0-0"), ParallelConfig(ranks="1-1"), None),
}
CONFIGS = [
    DistillConfig(cross_tokenizer=True, positions="all"),
    DistillConfig(
        cross_tokenizer=True,
        normalize="l2",
        positions="last_k",
        k=3,
        coefficient=100.0,
        final_state="pre_norm",
        layer_map={1: 5, 3: 2, 4: 4},
    ),
    DistillConfig(cross_tokenizer=True, positions="first_k", k=2, position_anchor="predictor", layers="odd"),
]  # fmt: skip


def few_samples() -> list[Sample]:
    """Eight, of which one has no pairs, one no response, and two use some of their states."""
    samples = random_samples(random.Random(4), 8)
    assert not samples[5].teacher.teacher_positions or not all(len(s.teacher.teacher_positions) for s in samples)
    long = [number for number, sample in enumerate(samples) if len(sample.teacher.teacher_positions) > 2]
    samples[long[0]] = replace(samples[long[0]], kept=(0,))
    samples[long[1]] = replace(samples[long[1]], kept=())
    return samples


def sharded(folder: Path, layout: str) -> list[dict[str, Any]]:
    """Loss, whole gradients, bytes sent and planned on this rank, for each of `CONFIGS`."""
    platform, models = select_platform("cpu"), []
    for name, parallel in zip(("teacher", "student"), LAYOUTS[layout][:2], strict=True):
        architecture = read_architecture(folder / name)
        grid_layout = resolve_layout(
            parallel, name=name, world_size=dist.get_world_size(), num_layers=architecture.num_layers,
            divisible=tp_divisible(architecture, pad_heads=False),
        )  # fmt: skip
        with platform.scope():
            grid = build_grid(grid_layout)
            init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        models.append(
            build_model(
                architecture, grid, platform, dtype=torch.float32, hf_dir=folder / name, frozen=name == "teacher"
            )
        )
    student, found = models[1], []
    optimizer = build_optimizer(student, OptimizerConfig(), 10, platform) if student.grid.is_member else None
    for distill in CONFIGS:
        alignment = Alignment(*models, distill, platform, 1 if dist.get_world_size() > 1 else 2, LAYOUTS[layout][2])
        plan = alignment.plan(few_samples())
        if optimizer:
            optimizer.zero_grad()
        report = alignment.reduce(alignment.run(plan, train=True, chunks=optimizer.chunks if optimizer else None))
        sent = torch.tensor([alignment.sent_bytes])
        dist.all_reduce(sent)
        gradients = {name: tensor.clone() for name, tensor in stream_gradients(student)} if optimizer else {}
        found.append(
            {"loss": report.loss, "gradients": gradients, "sent": int(sent), "planned": alignment.planned_bytes(plan)}
        )
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student of equal width with vocabularies of different sizes."""
    folder = tmp_path_factory.mktemp("pair")
    for name, layers, seed, vocab in (("teacher", 5, 1, TEACHER_VOCAB), ("student", 4, 2, STUDENT_VOCAB)):
        tiny_hf_model("llama", folder / name, num_layers=layers, seed=seed, std=0.1, vocab_size=vocab)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradient_equal_the_plain_reference(pair: Path, layout: str) -> None:
    """Loss to 1e-6 and every gradient element to 1e-5 of the largest, whatever the layouts, as transformers computes them when
    each model is fed its own ids; and as many bytes travel as were planned."""
    teacher, student = load_models({name: {"path": pair / name} for name in ("teacher", "student")})
    world = 1 if layout in ("single", "packed") else 2
    ranks = run_ranks(world, sharded, pair, layout)
    for number, distill in enumerate(CONFIGS):
        student.zero_grad()
        loss = plain_loss(
            teacher, student, [(s.teacher.ids, s.ids, supervised(s, distill)) for s in few_samples()], distill
        )
        loss.backward()
        expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        checked = 0
        for rank in ranks:
            found = rank[number]
            assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
            assert found["sent"] == found["planned"]
            if not found["gradients"]:
                continue
            checked += 1
            for name, gradient in expected.items():
                difference = (found["gradients"][name] - gradient).abs().max().item()
                assert difference <= 1e-5 * gradient.abs().max().item(), (distill, name)
            assert not any(found["gradients"][name].any() for name in set(found["gradients"]) - set(expected))
        assert checked == (1 if layout == "disjoint" else world)
    if layout in ("dp2 > cp2", "disjoint"):  # elsewhere each rank may have computed what it needs
        assert ranks[0][0]["sent"] > 0
