"""Spaces that states are compared in: what each side becomes, what a student that is its teacher loses there, and what W is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oprd_megatron.config.output import OutputConfig
from oprd_megatron.config.schema import DistillConfig, ParallelConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.objectives.output_loss import OutputLoss
from oprd_megatron.representation.alignment import Alignment
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.representation.flow import Passes
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.space import (
    Identity,
    Linear,
    LowRank,
    StateMap,
    check_space,
    refuse_head,
    resume_bridge,
)
from tests.ranks import run_ranks
from tests.representation.test_gradients import LAYOUTS, build, samples
from tests.tiny_models import tiny_hf_model

TEACHER_WIDTH, STUDENT_WIDTH, RANK = 8, 6, 4
CPU = torch.device("cpu")


def bridge(is_mlp: bool = False, seed: int = 0) -> Bridge:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"projection": (RANK, STUDENT_WIDTH)}
    if is_mlp:
        shapes = {"fc1.weight": (5, STUDENT_WIDTH), "fc1.bias": (5,), "fc2.weight": (RANK, 5), "fc2.bias": (RANK,)}
    return Bridge(
        RANK,
        means={2: torch.randn(TEACHER_WIDTH, generator=generator)},
        teacher={2: torch.randn(RANK, TEACHER_WIDTH, generator=generator)},
        student={1: {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}},
    )


@pytest.mark.parametrize("is_mlp", [False, True], ids=["linear", "mlp"])
@pytest.mark.parametrize("head", [0, 1, 3])
def test_low_rank(head: int, is_mlp: bool) -> None:
    """Eq. 12 and 14, state by state: the mean is the teacher's alone, and the first `head` directions of both sides are left
    out. Gradients reach the states, and no projection."""
    parts = bridge(is_mlp)
    space = LowRank(parts, head)
    assert space.width == RANK - head and space.trained(1) is None and space.whole is parts
    of_teacher, of_student = torch.randn(3, TEACHER_WIDTH), torch.randn(3, STUDENT_WIDTH, requires_grad=True)
    for row, found in zip(of_teacher, space.of_teacher(2, of_teacher), strict=True):
        torch.testing.assert_close(found, (parts.teacher[2] @ (row - parts.means[2]))[head:])
    mine = parts.student[1]
    for row, found in zip(of_student, space.of_student(1, of_student), strict=True):
        if is_mlp:
            hidden = torch.nn.functional.gelu(mine["fc1.weight"] @ row + mine["fc1.bias"])
            expected = mine["fc2.weight"] @ hidden + mine["fc2.bias"]
        else:
            expected = mine["projection"] @ row
        torch.testing.assert_close(found, expected[head:])
    space.of_student(1, of_student).sum().backward()
    assert of_student.grad is not None and of_student.grad.any()
    assert not any(part.requires_grad for part in mine.values())


def test_what_a_projection_sees() -> None:
    """The share of a state's square length in the row space of P_S, whatever the scale of its rows: 1 inside, 0 outside, by
    Pythagoras between. The head's directions are not seen; an MLP does not say."""
    parts = bridge()
    space = LowRank(parts)
    basis = torch.linalg.svd(parts.student[1]["projection"])[2]
    inside, outside = basis[1], basis[RANK]
    found = space.inside(1, torch.stack([inside, outside, 3 * inside + 4 * outside, torch.zeros(STUDENT_WIDTH)]))
    assert space.is_watched and found is not None
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.36, 0.0]), atol=1e-6, rtol=0)
    seen = LowRank(parts, head=2).inside(1, inside.unsqueeze(0))
    assert seen is not None and 0 <= seen.item() <= 1
    rows = torch.linalg.svd(parts.student[1]["projection"][2:])[2]
    torch.testing.assert_close(
        LowRank(parts, head=2).inside(1, rows[[0, 3]]), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0
    )
    mlp = LowRank(bridge(is_mlp=True))
    assert not mlp.is_watched and mlp.inside(1, of_width(STUDENT_WIDTH)) is None


def of_width(width: int) -> torch.Tensor:
    return torch.ones(1, width)


def test_a_bridge_is_replaced_whole() -> None:
    """After a refit all of it is the new one: both sides, what it sees, and what a checkpoint will hold; the head stays cut."""
    space, other = LowRank(bridge(), head=1), bridge(seed=1)
    space.replace(other)
    expected = LowRank(other, head=1)
    assert space.whole is other and space.width == RANK - 1
    assert torch.equal(space.of_teacher(2, of_width(TEACHER_WIDTH)), expected.of_teacher(2, of_width(TEACHER_WIDTH)))
    assert torch.equal(space.of_student(1, of_width(STUDENT_WIDTH)), expected.of_student(1, of_width(STUDENT_WIDTH)))
    assert torch.equal(space.inside(1, of_width(STUDENT_WIDTH)), expected.inside(1, of_width(STUDENT_WIDTH)))  # type: ignore[arg-type]


def test_resume_bridge_takes_what_a_checkpoint_has(tmp_path: Path) -> None:
    """A file there replaces the bridge; none there, or another space, changes nothing."""

    class Sized:
        def __init__(self, width: int) -> None:
            self.architecture = type("Architecture", (), {"hidden_size": width})

    models: Any = Sized(TEACHER_WIDTH), Sized(STUDENT_WIDTH)
    space, pairs = LowRank(bridge()), [LayerPair(1, 2)]
    before = space.whole
    resume_bridge(space, tmp_path / "bridge.safetensors", pairs, *models)
    assert space.whole is before
    save_file(bridge(seed=5).contiguous(), tmp_path / "bridge.safetensors")
    resume_bridge(Identity(8), tmp_path / "bridge.safetensors", pairs, *models)
    resume_bridge(space, tmp_path / "bridge.safetensors", pairs, *models)
    assert torch.equal(space.whole.student[1]["projection"], bridge(seed=5).student[1]["projection"])


def test_how_a_trained_map_begins() -> None:
    """Equal widths: the identity. Else numbers within +-1/sqrt(D_S) that only depend on the layer."""
    assert torch.equal(StateMap(3, 6, 6, torch.float32, CPU).weight, torch.eye(6))
    drawn = {layer: StateMap(layer, 64, 16, torch.float32, CPU).weight for layer in (1, 2)}
    assert drawn[1].shape == (64, 16) and drawn[1].abs().max() <= 0.25 and drawn[1].abs().max() > 0.24
    assert drawn[1].std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)
    assert not torch.equal(drawn[1], drawn[2])
    torch.manual_seed(99)
    assert torch.equal(drawn[2], StateMap(2, 64, 16, torch.float32, CPU).weight)
    assert StateMap(2, 64, 16, torch.bfloat16, CPU).weight.dtype == torch.bfloat16


def test_spaces_that_cannot_be(tmp_path: Path) -> None:
    """Each mistake costs one line with the way out."""
    save_file(bridge().contiguous(), tmp_path / "bridge.safetensors")
    at = tmp_path / "bridge.safetensors"
    mistakes: list[tuple[dict[str, Any], tuple[int, int], str]] = [
        ({}, (8, 6), "(8 and 6), which distill.mode identity cannot align; fit a bridge"),
        ({"mode": "identity"}, (8, 6), "or set distill.mode: linear"),
        ({"mode": "low_rank"}, (8, 8), "distill.mode: low_rank needs distill.bridge; make the file"),
        ({"mode": "low_rank_residual", "bridge_head": 1}, (8, 8), "low_rank_residual needs distill.bridge"),
        (
            {"mode": "low_rank_residual", "bridge_head": 4, "bridge": at},
            (8, 6),
            "bridge_head: 4 leaves nothing of a bridge of rank 4",
        ),
    ]
    for keys, widths, says in mistakes:
        with pytest.raises(ConfigError) as caught:
            check_space(DistillConfig(**keys), *widths)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    for keys, widths in (
        ({}, (8, 8)),
        ({"mode": "linear"}, (8, 6)),
        ({"mode": "none"}, (8, 6)),
        ({"bridge": at}, (8, 6)),
    ):
        check_space(DistillConfig(**keys), *widths)  # type: ignore[arg-type]
    refuse_head(DistillConfig(mode="low_rank_residual", bridge_head=3, bridge=at), 4)


def test_auto() -> None:
    """A bridge means low_rank and unit vectors; without one states are compared as they are. What is set is kept."""
    resolved = {
        (): ("identity", "none"),
        (("bridge", "b"),): ("low_rank", "l2"),
        (("mode", "linear"),): ("linear", "none"),
        (("mode", "none"),): ("none", "none"),
        (("bridge", "b"), ("mode", "low_rank_residual"), ("bridge_head", 2)): ("low_rank_residual", "l2"),
        (("bridge", "b"), ("normalize", "none")): ("low_rank", "none"),
        (("normalize", "l2"),): ("identity", "l2"),
    }
    for keys, expected in resolved.items():
        config = DistillConfig(**dict(keys))  # type: ignore[arg-type]
        assert (config.space, config.normalization) == expected


VOCAB, WIDTH = 300, 32
EVERY_TERM: list[dict[str, Any]] = [
    *({"kind": "sampled", "name": e, "estimator": e} for e in ("policy_gradient", "k2", "k3")),
    *({"kind": "topk", "name": f"{s} {r}", "k": 4, "support": s, "rest": r}
      for s in ("student", "teacher", "intersection", "union") for r in ("renormalize", "tail")),
    *({"kind": "full", "name": d, "divergence": d, "temperature": t}
      for d, t in (("reverse", 1.0), ("forward", 2.0), ("jensen_shannon", 0.5))),
]  # fmt: skip


def shared_bridge(path: Path, with_mean: bool) -> None:
    """The same projection for teacher and student."""
    tensors = {}
    for layer in range(1, 5):
        generator = torch.Generator().manual_seed(layer)
        projection = torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5
        mean = torch.randn(WIDTH, generator=generator) if with_mean else torch.zeros(WIDTH)
        tensors |= {f"teacher.{layer}.mean": mean, f"teacher.{layer}.projection": projection}
        tensors[f"student.{layer}.projection"] = projection.clone()
    save_file(tensors, path)


def of_itself(
    folder: Path,
    parallel: ParallelConfig,
    teacher: ParallelConfig | None,
    configs: dict[str, tuple[DistillConfig, OutputConfig]],
) -> dict[str, tuple[float, float | None, float, list[float]]]:
    """{config: (loss, mean cosine, largest gradient on this rank, means of the terms)} of a teacher that is its own student."""
    first = build(folder, folder, parallel, DistillConfig(), 2, teacher)
    found = {}
    for name, (config, terms) in configs.items():
        output = OutputLoss(first.teacher, first.student, terms, first.platform.device) if terms.terms else None
        signal = output.signal if output else None
        alignment = Alignment(first.teacher, first.student, config, first.platform, 2, signal=signal)
        parameters = [p for chunk in first.student.chunks for p in chunk.parameters()]
        for parameter in parameters:
            parameter.grad = None
        plan = alignment.plan(samples())
        batch = output.of_batch(plan, output.weights(0.0)) if output else None
        passes = Passes(train=True, on_outputs=batch.on_outputs if batch else None)
        report = alignment.reduce(alignment.run(plan, passes))
        gradients = [p.grad.abs().max().item() for p in parameters if p.grad is not None]
        assert gradients
        means = list(batch.means().values()) if batch else []
        found[name] = (report.loss, report.mean_cosine, max(gradients), means)
        if name == "linear":
            assert isinstance(alignment.space, Linear) and len(alignment.space.weights) > 0
            assert all(w.grad is not None for w in alignment.space.weights.values())
    return found


@pytest.fixture(scope="module")
def itself(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[DistillConfig, OutputConfig]]]:
    """A model (untied, so that the head is trained too), and every mode."""
    folder = tmp_path_factory.mktemp("itself")
    tiny_hf_model("llama", folder, vocab_size=VOCAB, std=0.1, tied=False)
    for name in ("centred", "off_centre"):
        shared_bridge(folder / f"{name}.bridge", with_mean=name == "off_centre")
    centred = {"bridge": folder / "centred.bridge"}
    keys: dict[str, dict[str, Any]] = {
        "identity": {},
        "identity l2": {"normalize": "l2"},
        "depth": {"layer_weights": "depth"},
        "low rank": centred,
        "low rank raw": {**centred, "normalize": "none"},
        "residual": {**centred, "mode": "low_rank_residual", "bridge_head": 1},
        "opd": {},
        "opd alone": {"coefficient": 0.0},
        "no states": {"mode": "none"},
        "off centre": {"bridge": folder / "off_centre.bridge", "normalize": "none"},
        "linear": {"mode": "linear"},
    }
    opd = OutputConfig.model_validate({"terms": [{"kind": "full"}]})
    every = OutputConfig.model_validate({"terms": EVERY_TERM, "chunk_tokens": 7})
    few = [term for term in EVERY_TERM if term["kind"] == "sampled" or term.get("support") == "teacher"]
    outputs = {"opd": opd, "opd alone": opd, "no states": every, "few": OutputConfig(terms=few, teacher_head="teacher")}
    keys["few"] = {}
    return folder, {name: (DistillConfig(**value), outputs.get(name, OutputConfig())) for name, value in keys.items()}


SELF_LAYOUTS: dict[str, tuple[ParallelConfig, ParallelConfig | None]] = {
    "single": (LAYOUTS["single"], None),
    "tp2": (LAYOUTS["tp2"], None),
    "tp2sp": (LAYOUTS["tp2sp"], None),
    "pp2": (LAYOUTS["pp2"], None),
    "cp2": (ParallelConfig(cp=2), None),
    "vpp2": (ParallelConfig(pp=2, vpp=2), None),
    "tp2_to_dp2": (LAYOUTS["dp2"], LAYOUTS["tp2"]),
    "pp2_to_tp2sp": (LAYOUTS["tp2sp"], LAYOUTS["pp2"]),
}


@pytest.mark.parametrize("layout", SELF_LAYOUTS)
def test_a_teacher_of_itself(itself: tuple[Path, dict[str, tuple[DistillConfig, OutputConfig]]], layout: str) -> None:
    """Loss 0, cosine 1 and no gradient, in every mode: W begins as the identity, and P_S = P_T does as long as the teacher's
    mean is 0. With a mean every state is off by P_T mu, and the loss is its mean square exactly."""
    folder, configs = itself
    parallel, teacher = SELF_LAYOUTS[layout]
    world = parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 1)
    for rank in run_ranks(world, of_itself, folder, parallel, teacher, configs):
        for name, (loss, cosine, gradient, terms) in rank.items():
            if name == "off centre":
                continue
            assert loss <= 1e-10 and all(abs(term) <= 1e-6 for term in terms), name
            assert cosine is None if name == "no states" else cosine == pytest.approx(1.0, abs=1e-5), name
            assert gradient <= 1e-6, name
        parts = load_file(folder / "off_centre.bridge")
        squares = [
            (parts[f"teacher.{n}.projection"] @ parts[f"teacher.{n}.mean"]).square().mean().item() for n in range(1, 5)
        ]
        assert rank["off centre"][0] == pytest.approx(sum(squares) / 4, rel=1e-4)
        assert rank["off centre"][2] > 1e-4
