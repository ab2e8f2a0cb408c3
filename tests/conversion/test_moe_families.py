"""The mixture-of-experts families: configs, files, and experts spread over gloo ranks, with a fake GPTModel.

The same on mcore's own models is in test_expert_parallel.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conversion_models import MOE_FAMILIES, ExpertPlace, FakeGPT, tiny_config, write_tiny_model
from safetensors.torch import load_file

from checkpoints_conversion import Sharding, check_model, mappings_for, read_architecture
from checkpoints_conversion.architecture import Experts
from checkpoints_conversion.live.weights import canonical_parameters, load_hf_weights, stream_hf_weights
from oprd_megatron.errors import CheckpointError
from tests.moe_configs import MIXTRAL_8X7B, MIXTRAL_8X22B, QWEN3_30B_A3B, QWEN3_235B_A22B
from tests.qwen_configs import write_config
from tests.ranks import run_ranks

PUBLISHED = [
    (QWEN3_30B_A3B, Experts(128, 8, 768, True), 30_532_122_624),
    (QWEN3_235B_A22B, Experts(128, 8, 1536, True), 235_093_634_560),
    (MIXTRAL_8X7B, Experts(8, 2, 14336, True), 46_702_792_704),
    (MIXTRAL_8X22B, Experts(8, 2, 16384, True), 140_620_634_112),
]
"""(config.json, experts, parameters of the published model)."""


@pytest.mark.parametrize(("config", "experts", "parameters"), PUBLISHED)
def test_published_models(config: dict[str, object], experts: Experts, parameters: int, tmp_path: Path) -> None:
    """Their configs are accepted, and the table has their number of parameters."""
    arch = read_architecture(write_config(tmp_path, config))
    assert arch.experts == experts and arch.ffn_hidden_size == experts.ffn_hidden_size
    assert arch.head_dim == 128 and arch.qk_norm == ("qwen3" in arch.family)
    shapes = [shape for row in mappings_for(arch).values() if row.exported for shape in row.hf_shapes.values()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_spellings_of_the_number_of_experts(key: str, tmp_path: Path) -> None:
    """Qwen3-MoE was published with num_experts; transformers 5 writes num_local_experts."""
    config = {name: value for name, value in QWEN3_30B_A3B.items() if name != "num_experts"} | {key: 16}
    assert read_architecture(write_config(tmp_path, config)).experts == Experts(16, 8, 768, True)


def test_absent_keys_mean_what_they_mean_in_transformers(tmp_path: Path) -> None:
    """Experts in every layer, not normalised; a window in all of Mixtral's layers or none."""
    optional = ("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "router_aux_loss_coef")
    config = {name: value for name, value in QWEN3_30B_A3B.items() if name not in optional}
    assert read_architecture(write_config(tmp_path, config)).experts == Experts(128, 8, 768, False)
    assert read_architecture(write_config(tmp_path, MIXTRAL_8X7B)).attention_windows == ()
    windowed = read_architecture(write_config(tmp_path, {**MIXTRAL_8X7B, "sliding_window": 4096}))
    assert windowed.attention_windows == (4096,) * 32


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (QWEN3_30B_A3B, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_30B_A3B, {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        (QWEN3_30B_A3B, {"num_experts": None}, "num_experts"),
        (QWEN3_30B_A3B, {"num_local_experts": 64}, "disagree"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": None}, "moe_intermediate_size"),
        (QWEN3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN3_30B_A3B, {"shared_expert_intermediate_size": 768}, "shared_expert_intermediate_size"),
        (QWEN3_30B_A3B, {"num_experts": 9999, "num_hidden_layers": 9999}, "are more than"),
        (MIXTRAL_8X7B, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (MIXTRAL_8X7B, {"num_local_experts": None}, "num_local_experts"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": None}, "num_experts_per_tok"),
        (MIXTRAL_8X7B, {"sliding_window": 0}, "sliding_window"),
        (MIXTRAL_8X7B, {"attention_bias": True}, "attention_bias"),
    ],
)
def test_refuses_by_name(config: dict[str, object], changes: dict[str, object], named: str, tmp_path: Path) -> None:
    """One line that names the file and the key."""
    with pytest.raises(CheckpointError) as refusal:
        read_architecture(write_config(tmp_path, {**config, **changes}))
    message = str(refusal.value)
    assert named in message and str(tmp_path / "config.json") in message and "\n" not in message


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_fused_experts_are_refused(family: str, tmp_path: Path) -> None:
    """transformers 5 can save all experts of a layer as one tensor; the message says how to save them apart."""
    model = write_tiny_model(family, tmp_path / "apart")
    check_model(tmp_path / "apart")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj holds all experts .* save_original_format=True"):
        check_model(tmp_path / "fused")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_have_global_names(family: str, tmp_path: Path) -> None:
    """Expert-parallel rank 1 of 2 holds experts 2 and 3 of 4, under either of mcore's names; the router is not an expert."""
    tiny_config(family).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    for grouped in (False, True):
        chunk = FakeGPT(arch, Sharding.smallest(arch), [2], fused=grouped, place=ExpertPlace(1, 2))
        names = [
            name.removeprefix("decoder.layers.1.mlp.") for name in canonical_parameters([chunk]) if ".mlp." in name
        ]
        experts = [f"experts.local_experts.{e}.linear_fc{n}.weight" for e in (2, 3) for n in (1, 2)]
        assert sorted(names) == sorted(["router.weight", *experts])


def spread_on_rank(
    hf_dirs: list[Path], ep_size: int, pp_size: int, expert_tp: int | None, grouped: bool
) -> list[list[str]]:
    """On rank (pp, ep, tp) of a grid, tp fastest: load and stream each model, compare with the file; names in order.

    `expert_tp` 1 of 2 tensor-parallel ranks: the expert-parallel group runs over them, as in mcore.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    tp_size = world // pp_size // (ep_size if expert_tp is None else ep_size // 2)
    inner = world // pp_size
    stage, place = divmod(rank, inner)
    columns = [list(range(i, world, inner)) for i in range(inner)]
    pp_group = _group(columns)
    tp_group = _group([list(range(first, first + tp_size)) for first in range(0, world, tp_size)])
    width = tp_size if expert_tp is None else expert_tp
    ep_group = _group(
        [[s * inner + t + width * e for e in range(ep_size)] for s in range(pp_size) for t in range(width)]
    )
    expert_group = None if expert_tp is None else _group([[r] for r in range(world)])
    layers, orders = {1: [[1, 2, 3]], 2: [[1], [2, 3]]}[pp_size][stage], []
    for hf_dir in hf_dirs:
        arch = check_model(hf_dir)
        sharding = Sharding.smallest(arch, rank % tp_size, tp_size, vocab_multiple=8)
        chunk = FakeGPT(
            arch, sharding, layers, first=stage == 0, last=stage == pp_size - 1, fused=grouped,
            place=ExpertPlace(place // width, ep_size, expert_tp),
        )  # fmt: skip
        load_hf_weights([chunk], hf_dir, sharding, arch, expert_group)
        before = [parameter.clone() for parameter in chunk.parameters()]
        streamed = list(stream_hf_weights([chunk], arch, sharding, tp_group, pp_group, ep_group, expert_group))
        expected = load_file(hf_dir / "model.safetensors")
        assert len(streamed) == len(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed)
        assert all(torch.equal(a, b) for a, b in zip(before, chunk.parameters(), strict=True))
        orders.append([name for name, _ in streamed])
    return orders


def _group(rank_lists: list[list[int]]) -> dist.ProcessGroup:
    group, _ = dist.new_subgroups_by_enumeration(rank_lists)
    return group


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("ranks", "ep_size", "pp_size", "expert_tp"),
    [(2, 2, 1, None), (4, 4, 1, None), (4, 2, 2, None), (4, 2, 1, None), (2, 2, 1, 1), (4, 2, 2, 1)],
)
def test_every_rank_streams_the_source(
    ranks: int, ep_size: int, pp_size: int, expert_tp: int | None, grouped: bool, tmp_path: Path
) -> None:
    """Experts over 2 or 4 ranks, with stages, with tensor parallelism, and whole on ranks that cut the rest: every rank
    yields the file bitwise, in one order, and holds only its experts."""
    hf_dirs = [tmp_path / family for family in MOE_FAMILIES]
    for family, hf_dir in zip(MOE_FAMILIES, hf_dirs, strict=True):
        write_tiny_model(family, hf_dir, tied=family == "mixtral")
    orders = run_ranks(ranks, spread_on_rank, hf_dirs, ep_size, pp_size, expert_tp, grouped)
    assert orders == orders[:1] * ranks


def disagree_on_rank(hf_dir: Path) -> str:
    """Both ranks claim the experts of rank 0."""
    arch = check_model(hf_dir)
    chunk = FakeGPT(arch, Sharding.smallest(arch), [1, 2, 3], place=ExpertPlace(0, 2))
    with pytest.raises(AssertionError) as refusal:
        list(stream_hf_weights([chunk], arch, Sharding.smallest(arch), None, None, dist.group.WORLD))
    return str(refusal.value)


def test_an_expert_has_one_owner(tmp_path: Path) -> None:
    """Two ranks with the same experts are refused on both, by the first expert's name, before anything is sent."""
    write_tiny_model("mixtral", tmp_path)
    for message in run_ranks(2, disagree_on_rank, tmp_path):
        assert "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight is on" in message


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """An expert cut in two where the group says whole."""
    write_tiny_model("mixtral", tmp_path)
    arch = check_model(tmp_path)
    chunk = FakeGPT(arch, Sharding.smallest(arch), [1, 2, 3], place=ExpertPlace(tp_size=2))
    with pytest.raises(AssertionError, match=r"linear_fc1\.weight is"):
        load_hf_weights([chunk], tmp_path, Sharding.smallest(arch), arch)


def test_the_table_goes_layer_by_layer(tmp_path: Path) -> None:
    """Streaming order: a layer's router, then its experts by number, before the next layer."""
    arch = read_architecture(write_config(tmp_path, json.loads(json.dumps(MIXTRAL_8X7B))))
    names = [name for name in mappings_for(replace(arch, num_layers=2)) if ".mlp." in name]
    assert names == [
        f"decoder.layers.{layer}.mlp.{part}"
        for layer in range(2)
        for part in ["router.weight"]
        + [f"experts.local_experts.{e}.linear_fc{n}.weight" for e in range(8) for n in (1, 2)]
    ]
