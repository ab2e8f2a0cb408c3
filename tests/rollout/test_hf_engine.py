"""The transformers engine: text that depends on its sample alone, weights that are really the ones that were sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from oprd_megatron.errors import CheckpointError, ConfigError, WeightSyncError
from oprd_megatron.rollout import HFEngine, Prompt, Request, Rollout, SamplingParams, make_requests
from tests.tiny_models import EOS_ID, Family, randomise, tiny_hf_model, tiny_tokenizer

TEXT_IDS = [(70, 71, 72), (80,), (90, 91, 92, 93, 94, 95, 96), (100, 101), (110, 111, 112, 113)]
PROMPTS = [Prompt(10 + index, "", ids) for index, ids in enumerate(TEXT_IDS)]
SHORT = SamplingParams(max_response_tokens=12, seed=4)
GREEDY = SamplingParams(temperature=0, max_response_tokens=12)


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What a trainer sends: every weight once, in random-looking order, without a tied lm_head."""
    return iter(sorted(((n, p.detach().clone()) for n, p in model.named_parameters()), key=lambda item: item[0][::-1]))


def engine_for(hf_dir: Path, model: PreTrainedModel, batch_size: int = 4) -> HFEngine:
    engine = HFEngine(hf_dir, torch.float32, "cpu", batch_size)
    engine.update_weights(1, weights_of(model))
    return engine


def greedy(model: PreTrainedModel, prompt: Prompt, count: int) -> tuple[int, ...]:
    """The plainest decoding there is: no cache, no padding, argmax, until the end-of-sequence token."""
    ids = list(prompt.token_ids)
    while len(ids) < len(prompt.token_ids) + count:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS_ID:
            break
    return tuple(ids[len(prompt.token_ids) :])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    hf_dir = tmp_path_factory.mktemp("llama")
    return hf_dir, tiny_hf_model("llama", hf_dir, num_layers=2)


def test_a_samples_text_does_not_depend_on_its_batch(llama: tuple[Path, PreTrainedModel]) -> None:
    """Alone, in batches of any size and in any company, a sample has one text; results keep the requests' order."""
    requests = make_requests(PROMPTS, 2)
    whole = engine_for(*llama, batch_size=10).generate(requests, SHORT, step=5)
    assert [rollout.sample_index for rollout in whole] == list(range(10))
    assert [rollout.prompt_index for rollout in whole] == [request.prompt.index for request in requests]
    for batch_size in (1, 3):
        check_same(engine_for(*llama, batch_size=batch_size).generate(requests, SHORT, step=5), whole)
    engine = engine_for(*llama)
    check_same([engine.generate([request], SHORT, step=5)[0] for request in requests], whole)
    check_same(engine.generate(requests[5:2:-1], SHORT, step=5), whole[5:2:-1])


def check_same(found: list[Rollout], expected: list[Rollout]) -> None:
    """The same text; log-probabilities up to rounding (1e-4: as for scores)."""
    assert [replace(rollout, logprobs=None) for rollout in found] == [replace(r, logprobs=None) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_text_taken_in_parts_is_the_same(llama: tuple[Path, PreTrainedModel]) -> None:
    """Batches of three, longest prompts first, taken when there are enough tokens: all responses once, each take in order of
    sample indices; nothing is written before it is asked for."""
    requests = make_requests(PROMPTS, 2)
    engine = engine_for(*llama, batch_size=3)
    whole = engine.generate(requests, SHORT, step=5)
    generation, taken = engine.start(requests, SHORT, step=5), []
    while not generation.is_taken:
        part = generation.take(min_tokens=13)  # a response has 12 at most: one batch or two
        assert [rollout.sample_index for rollout in part] == sorted(rollout.sample_index for rollout in part)
        assert generation.is_taken or sum(len(rollout.response_ids) for rollout in part) >= 13
        taken.append(part)
    assert len(taken) > 2
    assert sorted((r for part in taken for r in part), key=lambda rollout: rollout.sample_index) == whole
    assert generation.take() == []
    late = engine.start(requests, SHORT, step=5)
    engine.update_weights(2, weights_of(llama[1]))
    with pytest.raises(AssertionError, match="before all rollouts were taken"):
        late.take()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("params", [
    SamplingParams(max_response_tokens=12, seed=4),
    SamplingParams(temperature=0.6, max_response_tokens=12, seed=4),
    SamplingParams(temperature=1.5, top_p=0.7, max_response_tokens=12, seed=4, vocab_size=200),
    SamplingParams(temperature=0, top_p=0.5, max_response_tokens=12, vocab_size=200),
], ids=["plain", "tempered", "nucleus", "greedy"])  # fmt: skip
def test_log_probabilities_are_of_what_the_tokens_were_drawn_from(
    tmp_path: Path, family: Family, params: SamplingParams
) -> None:
    """One for each response token, as a plain forward of transformers (no cache, no padding) gives it after limit,
    temperature and nucleus; without any of them, what `score` says. 1e-4 nats is rounding."""
    model = tiny_hf_model(family, tmp_path, num_layers=2)
    engine = engine_for(tmp_path, model, batch_size=3)
    rollouts = engine.generate(make_requests(PROMPTS, 2), params, step=1)
    for rollout in rollouts:
        ids, first = rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, first - 1 : -1, : params.vocab_size]
        probs = (logits.double() / (params.temperature or 1)).softmax(-1)
        if params.top_p < 1 and params.temperature:
            for row in probs:
                order = row.argsort(descending=True)
                row[order[row[order].cumsum(0) - row[order] >= params.top_p]] = 0
            probs /= probs.sum(-1, keepdim=True)
        expected = probs.log().gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        if params == SHORT:
            assert rollout.logprobs == pytest.approx(engine.score([list(ids)])[0][first - 1 :].tolist(), abs=1e-4)
    assert {len(rollout.response_ids) for rollout in rollouts} >= {12}


def test_samples_steps_and_seeds_differ(llama: tuple[Path, PreTrainedModel]) -> None:
    """Two samples of one prompt, two steps and two seeds give different texts; the same call gives the same."""
    engine = engine_for(*llama)
    one = engine.generate([Request(PROMPTS[0], 0)], SHORT, 0)[0].response_ids
    others = [
        engine.generate([Request(PROMPTS[0], 1)], SHORT, 0),
        engine.generate([Request(PROMPTS[0], 0)], SHORT, 1),
        engine.generate([Request(PROMPTS[0], 0)], SamplingParams(max_response_tokens=12, seed=5), 0),
    ]
    assert all(other[0].response_ids != one for other in others)
    assert engine.generate([Request(PROMPTS[0], 0)], SHORT, 0)[0].response_ids == one


def test_generation_leaves_torchs_random_state_alone(llama: tuple[Path, PreTrainedModel]) -> None:
    """Neither building the engine nor sampling draws from the global generator."""
    before = torch.get_rng_state()
    engine_for(*llama).generate(make_requests(PROMPTS, 1), SHORT, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_new_weights_equal_a_fresh_model(tmp_path: Path, family: Family, tied: bool) -> None:
    """After an update to perturbed weights, embeddings included, greedy text and scores are those of a model that
    transformers loads from disk with these weights; and the text is not that of the first weights."""
    model = tiny_hf_model(family, tmp_path / "first", tied=tied, num_layers=2)
    engine = engine_for(tmp_path / "first", model)
    first = engine.generate(make_requests(PROMPTS, 1), GREEDY, 0)
    randomise(model, seed=99)
    model.save_pretrained(tmp_path / "second")
    engine.update_weights(2, weights_of(model))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32)
    second = engine.generate(make_requests(PROMPTS, 1), GREEDY, 0)
    assert [rollout.response_ids for rollout in second] == [greedy(fresh, prompt, 12) for prompt in PROMPTS]
    assert [rollout.response_ids for rollout in first] != [rollout.response_ids for rollout in second]
    assert {rollout.weight_version for rollout in first + second} == {1, 2}
    check_scores(engine, fresh)


def check_scores(engine: HFEngine, model: PreTrainedModel) -> None:
    """fp32, sdpa with and without padding: 1e-4 nats is rounding (logits of the tiny models reach +-20)."""
    sequences = [[*ids, 5, 6, 7] for ids in TEXT_IDS]
    for sequence, score in zip(sequences, engine.score(sequences), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(
            score, expected.gather(-1, torch.tensor(sequence[1:])[:, None])[:, 0], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_model_has_right_rotary_frequencies(llama: tuple[Path, PreTrainedModel], dtype: torch.dtype) -> None:
    """The buffers that no update sends equal those of a model loaded from disk in the same dtype."""
    engine = HFEngine(llama[0], dtype, "cpu", 4)
    loaded = AutoModelForCausalLM.from_pretrained(llama[0], dtype=dtype)
    expected = dict(loaded.named_buffers())
    assert expected
    for name, buffer in engine._model.named_buffers():
        torch.testing.assert_close(buffer, expected[name], atol=0, rtol=0)
    assert {p.dtype for p in engine._model.parameters()} == {dtype}


def test_bf16_scores_are_fp32_sums(llama: tuple[Path, PreTrainedModel]) -> None:
    """A bf16 engine takes fp32 weights and returns fp32 scores close to the fp32 ones."""
    engine = HFEngine(llama[0], torch.bfloat16, "cpu", 2)
    engine.update_weights(1, weights_of(llama[1]))
    exact = engine_for(*llama).score([[5, 6, 7, 8]])[0]
    (score,) = engine.score([[5, 6, 7, 8]])
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, exact, atol=0.5, rtol=0)  # bf16 logits of size 10 are rounded to 0.03


def test_an_update_is_strict(llama: tuple[Path, PreTrainedModel]) -> None:
    """A missing, unknown, repeated or misshapen weight is named, and the engine then refuses to work until mended."""
    engine = engine_for(*llama)
    good = dict(weights_of(llama[1]))
    name = "model.layers.1.mlp.up_proj.weight"
    bad = {
        rf"1 weights were not sent, the first is '{name}'": [item for item in good.items() if item[0] != name],
        "no weight 'model.layers.7.x'": [*good.items(), ("model.layers.7.x", torch.zeros(1))],
        "no weight 'lm_head.weight' .*tied": [*good.items(), ("lm_head.weight", good["model.embed_tokens.weight"])],
        f"'{name}' was sent twice": [*good.items(), (name, good[name])],
        rf"'{name}' has shape \[32, 64\], .* \[64, 32\]": [*({**good, name: good[name].T.contiguous()}).items()],
    }
    for message, tensors in bad.items():
        with pytest.raises(WeightSyncError, match=message):
            engine.update_weights(2, iter(tensors))
        with pytest.raises(WeightSyncError, match="call update_weights first"):
            engine.generate(make_requests(PROMPTS, 1), SHORT, 0)
        with pytest.raises(WeightSyncError, match="call update_weights first"):
            engine.score([[5, 6]])
    engine.update_weights(3, iter(good.items()))
    assert engine.generate(make_requests(PROMPTS, 1), SHORT, 0)[0].weight_version == 3


def test_an_update_takes_trainable_parameters(llama: tuple[Path, PreTrainedModel]) -> None:
    """Weights that require grad are copied by value: the engine's stay outside any graph and keep their values."""
    hf_dir, model = llama
    trained = {name: weight.clone().requires_grad_() for name, weight in weights_of(model)}
    engine = HFEngine(hf_dir, torch.float32, "cpu", 4)
    engine.update_weights(1, iter(trained.items()))
    before = engine.score([[5, 6, 7]])[0]
    assert not any(weight.requires_grad for weight in engine._model.parameters())
    with torch.no_grad():
        trained["model.norm.weight"].zero_()
    assert torch.equal(engine.score([[5, 6, 7]])[0], before)


def test_a_fresh_engine_refuses_to_work(llama: tuple[Path, PreTrainedModel]) -> None:
    """Uninitialised parameters never write text."""
    with pytest.raises(WeightSyncError, match="has no weights"):
        HFEngine(llama[0], torch.float32, "cpu", 4).generate(make_requests(PROMPTS, 1), SHORT, 0)


def responses(hf_dir: Path, model: PreTrainedModel, params: SamplingParams) -> list[Rollout]:
    return engine_for(hf_dir, model, batch_size=16).generate(make_requests(PROMPTS, 3), params, 0)


def test_responses_end_with_the_end_of_sequence_token(tmp_path: Path) -> None:
    """With many end tokens, responses end at the first one, which they keep, or are cut at the limit; never empty."""
    model = tiny_hf_model("llama", tmp_path, num_layers=2, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)  # nearly uniform over a vocabulary of 288
    ends = list(range(100, 150))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rollouts = responses(tmp_path, model, SamplingParams(max_response_tokens=6))
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        *body, last = rollout.response_ids
        assert not set(body) & {EOS_ID, *ends}
        assert rollout.finished == (last in ends)
        assert len(rollout.response_ids) == 6 or rollout.finished


def test_stop_strings_end_a_response(llama: tuple[Path, PreTrainedModel]) -> None:
    """A response is cut after the token that writes the stop string, which it keeps; the others stay whole."""
    free = responses(*llama, SamplingParams(max_response_tokens=12))
    texts = {token: tiny_tokenizer().decode([token]) for rollout in free for token in rollout.response_ids[2:8]}
    token, text = next((token, text) for token, text in texts.items() if len(text) == 1 and text.isascii())
    stopped = responses(*llama, SamplingParams(max_response_tokens=12, stop=("never written", text)))
    assert {token in rollout.response_ids for rollout in free} == {True, False}
    for short, whole in zip(stopped, free, strict=True):
        ids = whole.response_ids
        cut = ids[: ids.index(token) + 1] if token in ids else ids
        assert short.response_ids == cut
        assert short.finished == (cut[-1] in (token, EOS_ID))


def test_the_directorys_sampling_defaults_do_not_leak_in(tmp_path: Path) -> None:
    """repetition_penalty, min_new_tokens, temperature and others of generation_config.json change nothing."""
    model = tiny_hf_model("qwen2", tmp_path, num_layers=2)
    plain = responses(tmp_path, model, SHORT)
    defaults = {"do_sample": True, "temperature": 0.1, "top_k": 1, "repetition_penalty": 9.0, "max_length": 3,
                "bad_words_ids": [[7]], "suppress_tokens": [8, 9], "eos_token_id": EOS_ID}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
    assert responses(tmp_path, model, SHORT) == plain


def test_what_does_not_fit_the_context_is_refused(llama: tuple[Path, PreTrainedModel]) -> None:
    """Prompt plus longest response must fit max_position_embeddings (512 here)."""
    engine = engine_for(*llama)
    with pytest.raises(ConfigError, match=r"a prompt of 7 tokens and max_response_tokens 506 .* 512"):
        engine.generate(make_requests(PROMPTS, 1), SamplingParams(max_response_tokens=506), 0)


def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    """No config.json, or an architecture that transformers does not know."""
    tiny_hf_model("llama", tmp_path, num_layers=1)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match="cannot build a causal language model") as caught:
        HFEngine(tmp_path, torch.float32, "cpu", 1)
    assert "\n" not in str(caught.value)


def test_close_frees_the_weights(llama: tuple[Path, PreTrainedModel]) -> None:
    """After close nothing is held and nothing works."""
    engine = engine_for(*llama)
    engine.close()
    assert {parameter.device.type for parameter in engine._model.parameters()} == {"meta"}
    with pytest.raises(WeightSyncError):
        engine.score([[5, 6]])
