"""`oprd plan`: its figures against counting one state at a time, and what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.config import parse_config
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import UserError
from oprd_megatron.launching.ranks import default_num_ranks
from oprd_megatron.planning import RunPlan, plan_run, plan_text
from oprd_megatron.planning.heat_map import draw_heat_map, traffic_blocks
from oprd_megatron.planning.text import ranges, size
from oprd_megatron.representation import grids
from tests.grids import Case
from tests.qwen_configs import QWEN_7B, QWEN_72B, write_config
from tests.test_cli import assert_done, assert_refused, oprd, yaml_of

SMALL = {**QWEN_7B, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4,
         "vocab_size": 1000}  # fmt: skip
PROMPT, RESPONSE, SAMPLES = 6, 10, 16


def values_for(
    folder: Path, teacher: dict[str, Any], student: dict[str, Any], /, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A run of a 12-layer teacher and a 6-layer student, 64 wide, of which only the config.json files exist."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(write_config(folder / "teacher", {**SMALL, "num_hidden_layers": 12})), "parallel": teacher},
        "student": {"path": str(write_config(folder / "student", {**SMALL, "num_hidden_layers": 6})), "parallel": student},
        "rollout": {
            "prompts": {"path": "none.jsonl", "max_tokens": PROMPT}, "prompts_per_step": SAMPLES // 2,
            "responses_per_prompt": 2, "max_response_tokens": RESPONSE,
        },
        "distill": {"positions": "last_k", "k": 7},
    }  # fmt: skip
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def config_for(folder: Path, *layouts: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return parse_config(values_for(folder, *layouts, **sections), "test")


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp_pp": ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 4}),
    "sp_cp": ({"tp": 2, "sp": True, "cp": 2, "pp": 2}, {"dp": 8}),
    "vpp": ({"pp": 2, "vpp": 2}, {"tp": 4, "sp": True, "dp": 2}),
    "disjoint": ({"pp": 2, "ranks": "0-3"}, {"tp": 2, "ranks": "4-7"}),
    "same": ({"tp": 2, "pp": 4}, {"tp": 2, "pp": 4}),
}
GPUS_PER_NODE = 4


@pytest.fixture(params=LAYOUTS)
def planned(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunConfig, RunPlan]:
    config = config_for(tmp_path, *LAYOUTS[request.param])
    return config, plan_run(config, 8, GPUS_PER_NODE)


def chunk_cases(config: RunConfig, plan: RunPlan) -> list[Case]:
    """Each chunk of the plan, to be counted from first principles."""
    teacher, student = plan.teacher.layout, plan.student.layout
    planner = grids.planner(config, plan.pairs, plan.teacher.architecture, teacher, student)
    return [
        Case([(PROMPT, RESPONSE)] * len(chunk.samples), teacher, student, config=config.distill)
        for chunk in planner.plan(grids.longest_samples(config)).chunks
    ]


def test_stages_are_counted_right(planned: tuple[RunConfig, RunPlan]) -> None:
    """States, bytes and what stays for every pair of stages, state by state from what each rank needs and computes."""
    config, plan = planned
    needed, lacking = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for case in chunk_cases(config, plan):
        for rank in case.student_layout.ranks:
            stage = case.student_layout.coords(rank).pp
            for (_, layer), codes in case.needed(rank).items():
                pair = case.teacher_layout.stage_of(layer), stage
                here = case.held(rank, layer)
                needed[pair] += len(codes)
                lacking[pair] += sum(code not in here for code in codes)
    traffic = plan.traffic
    assert traffic.state_bytes == 2 * 64
    assert {(row.teacher_stage, row.student_stage): row.states for row in traffic.stages} == dict(needed)
    for row in traffic.stages:
        gone = lacking[row.teacher_stage, row.student_stage]
        assert row.moved_bytes == gone * traffic.state_bytes
        assert row.stays == pytest.approx(1 - gone / row.states)
        assert set(row.layers) == {
            p.teacher_layer for p in plan.pairs if stages(plan, p) == (row.teacher_stage, row.student_stage)
        }
    assert traffic.total_bytes == lacking.total() * traffic.state_bytes
    assert traffic.same_rank_bytes + traffic.total_bytes == needed.total() * traffic.state_bytes
    assert needed.total() == 6 * 7 * SAMPLES


def stages(plan: RunPlan, pair: Any) -> tuple[int, int]:
    return plan.teacher.layout.stage_of(pair.teacher_layer), plan.student.layout.stage_of(pair.student_layer)


def test_links_are_counted_right(planned: tuple[RunConfig, RunPlan]) -> None:
    """By pair of ranks, by class of link, busiest ranks and messages, transfer by transfer."""
    config, plan = planned
    links, classes, sent, received, messages = Counter[Any](), Counter[str](), Counter[int](), Counter[int](), 0
    for case in chunk_cases(config, plan):
        for transfer in case.transfers:
            size_ = transfer.num_states * plan.traffic.state_bytes
            ends = transfer.source, transfer.destination
            if ends[0] != ends[1]:
                links[ends] += size_
                sent[ends[0]] += size_
                received[ends[1]] += size_
                messages += 1
            near = ends[0] // GPUS_PER_NODE == ends[1] // GPUS_PER_NODE
            classes["rank" if ends[0] == ends[1] else "node" if near else "far"] += size_
    traffic = plan.traffic
    assert {(a, b): number for a, b, number in traffic.links} == dict(links)
    assert [link[2] for link in traffic.links] == sorted(links.values(), reverse=True)
    assert (traffic.same_rank_bytes, traffic.same_node_bytes, traffic.between_nodes_bytes) == (
        classes["rank"], classes["node"], classes["far"],
    )  # fmt: skip
    assert traffic.num_messages == messages
    for most, counted in ((traffic.most_sent, sent), (traffic.most_received, received)):
        assert (most is None) == (not counted)
        if most is not None:
            assert counted[most[0]] == most[1] == max(counted.values())


def test_spool_and_sums_of_ranks(planned: tuple[RunConfig, RunPlan]) -> None:
    """Every rank once; a rank's row is its stages' memory, the larger activations, the plan's states and an engine."""
    config, plan = planned
    assert sum(row.num_ranks for row in plan.ranks) == 8
    held: dict[int, list[int]] = defaultdict(list)
    for case in chunk_cases(config, plan):
        for rank in range(8):
            held[rank].append(case.route.held_bytes(plan.traffic.state_bytes).get(rank, 0))
    for row in plan.ranks:
        on = [(plan.teacher.memory, row.teacher_stage), (plan.student.memory, row.student_stage)]
        memory = [None if stage is None else rows[stage] for rows, stage in on]
        assert (row.teacher, row.student) == tuple(m.states if m else 0 for m in memory)
        assert row.activations == max(m.activations for m in memory if m)
        ranks = [r for r in range(8) if tuple(place(layout, r) for layout in (plan.teacher.layout, plan.student.layout))
                 == (row.teacher_stage, row.student_stage)]  # fmt: skip
        assert (row.first_rank, row.num_ranks) == (ranks[0], len(ranks))
        together = max if None not in (row.teacher_stage, row.student_stage) else sum
        assert row.spool == max(together(held[r]) for r in ranks)
        assert row.engine == (plan.student.engine_bytes if row.student_stage is not None else 0)
        assert row.device_bytes == row.teacher + row.student + row.activations + row.spool + row.engine


def place(layout: Any, rank: int) -> int | None:
    return layout.coords(rank).pp if rank in layout.ranks else None


def test_host_spool_is_no_device_memory(tmp_path: Path) -> None:
    """And few engines are on few ranks."""
    config = config_for(tmp_path, {"pp": 2}, {"pp": 2}, distill={"spool": "host"}, rollout={"num_engines": 1})
    plan = plan_run(config, 4)
    first, second = plan.ranks
    assert first.spool > 0 and first.device_bytes == first.teacher + first.student + first.activations + first.engine
    assert (first.engine, second.engine) == (plan.student.engine_bytes, 0)
    assert "host spool" in plan_text(plan)


def test_a_budget_makes_chunks(tmp_path: Path) -> None:
    """Under a budget every rank's states fit, in more chunks; the same states are exchanged."""
    whole = plan_run(config_for(tmp_path, {"pp": 2}, {"tp": 2}), 2)
    most = max(row.spool for row in whole.ranks)
    config = config_for(
        tmp_path, {"pp": 2}, {"tp": 2}, distill={"positions": "last_k", "k": 7, "spool_bytes": most // 3}
    )
    plan = plan_run(config, 2)
    assert whole.batch.num_chunks == 1 < 3 <= plan.batch.num_chunks
    assert max(row.spool for row in plan.ranks) <= most // 3
    assert plan.traffic.total_bytes == whole.traffic.total_bytes
    assert f"{plan.batch.num_chunks} chunks (spool_bytes {size(most // 3)})" in plan_text(plan)


def test_follow_student(tmp_path: Path) -> None:
    """What the line promises is what a plan with follow_student sends, and that plan tells the same saving."""
    student = {"pp": 2, "layers_per_stage": [1, 5]}
    even = plan_run(config_for(tmp_path, {"pp": 2}, student), 2)
    following = plan_run(config_for(tmp_path, {"pp": 2, "layers_per_stage": "follow_student"}, student), 2)
    assert even.follow is not None and following.follow is not None
    assert even.follow.moved_bytes == following.follow.moved_bytes == following.traffic.total_bytes == 0
    assert even.follow.other_bytes == following.follow.other_bytes == even.traffic.total_bytes > 0
    assert even.follow.stages == following.follow.stages == following.teacher.layout.layers_per_stage
    assert (even.follow.is_configured, following.follow.is_configured) == (False, True)
    assert f"follow_student would send 100% less (0 B, not {size(even.traffic.total_bytes)})" in plan_text(even)
    assert f"follow_student sends 100% less than even stages (0 B, not {size(even.traffic.total_bytes)})" in plan_text(
        following
    )


def test_nothing_to_follow(tmp_path: Path) -> None:
    """No advice where stages are the same already, and none on ranks of its own, where all states travel anyway."""
    same = plan_run(config_for(tmp_path, {"pp": 2}, {"pp": 2}), 2)
    assert same.follow is not None and same.follow.saving < 0.2
    alone = plan_run(config_for(tmp_path, {"pp": 2, "ranks": "0-1"}, {"ranks": "2-2"}), 3)
    single = plan_run(config_for(tmp_path, {"tp": 2}, {"pp": 2}), 2)
    assert alone.follow is None and single.follow is None
    assert not any("follow_student" in plan_text(plan) for plan in (alone, single))


def test_text(tmp_path: Path) -> None:
    """Ranks, layers and coordinates where a reader looks for them, in 100 columns."""
    config = config_for(
        tmp_path, {"tp": 2, "cp": 2, "pp": 2}, {"tp": 2, "pp": 2, "vpp": 3}, run={"dir": "x", "micro_batch_size": 2}
    )
    text = plan_text(plan_run(config, 8))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "16 rollouts of 6 + 10 tokens, 112 of them supervised" in " ".join(text.split())
    assert row(text, "0 [0 1 | 2 3] embedding, layers 1-6")
    assert row(text, "1 [4 5 | 6 7] layers 7-12, final norm")
    assert row(text, "0 [0 1] 0-3 embedding, layers 1 | 3 | 5")
    assert row(text, "1 [4 5] 4-7 layers 2 | 4 | 6, final norm, head")
    assert row(text, "7 0 tp 1 cp 1 dp 0 pp 1 tp 1 cp 0 dp 1 pp 1")
    assert row(text, "0 -> 0 1 <- 1")
    assert row(text, "1 -> 1 6 <- 12")
    assert "tp 2 x pp 2 x vpp 3 x dp 2 on ranks 0-7; 4 micro-batches" in text


def row(text: str, words: str) -> bool:
    """Whether a line begins with these words, whatever the blanks between them."""
    spaced = lambda line: " ".join(re.sub(r"([\[\]|])", r" \1 ", line).split())  # noqa: E731
    return any(spaced(line).startswith(spaced(words)) for line in text.splitlines())


def test_large_worlds_are_not_listed(tmp_path: Path) -> None:
    """Above 16 ranks: stages, not ranks; many ranks of a stage are shortened."""
    config = config_for(
        tmp_path,
        {"tp": 4, "cp": 4},
        {"tp": 2},
        rollout={**values_for(tmp_path, {}, {})["rollout"], "prompts_per_step": 16},
    )
    text = plan_text(plan_run(config, 32))
    assert "EVERY RANK" not in text
    assert row(text, "0 [ 0 1 .. 15 ] 0-31 embedding, layers 1-12, final norm")


def test_ranges_and_sizes() -> None:
    """As people write them."""
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert [size(n) for n in (0, 999, 1000, 1536, 5 * 2**30)] == ["0 B", "999 B", "1.0 KiB", "1.5 KiB", "5.0 GiB"]


@pytest.mark.parametrize(
    ("teacher", "student", "ranks"),
    [
        ({}, {}, 1),
        ({"tp": 2, "cp": 2}, {"tp": 2}, 4),
        ({}, {"tp": 2, "cp": 2, "pp": 2, "dp": 3}, 24),
        ({"tp": 8, "ranks": "0-7"}, {"tp": 4, "ranks": "8-15"}, 16),
        ({"ranks": "4-5"}, {"ranks": "0-3"}, 6),
    ],
)
def test_default_ranks(tmp_path: Path, teacher: dict[str, Any], student: dict[str, Any], ranks: int) -> None:
    """As many as the layouts name, of the model that needs more."""
    assert default_num_ranks(config_for(tmp_path, teacher, student)) == ranks


def test_heat_map(tmp_path: Path) -> None:
    """Every link in its cell; more than 256 ranks in blocks of 2, 4, ..; also a plan in which nothing moves has a picture."""
    plan = plan_run(config_for(tmp_path, {"pp": 2}, {"tp": 4}), 8)
    table, block = traffic_blocks(plan)
    assert block == 1 and table.shape == (8, 8)
    assert {(a, b): int(table[a, b]) for a, b in zip(*table.nonzero(), strict=True)} == {
        (a, b): n for a, b, n in plan.traffic.links
    }
    rollout = {**values_for(tmp_path, {}, {})["rollout"], "prompts_per_step": 256}
    large = plan_run(config_for(tmp_path, {"pp": 2}, {"tp": 4}, rollout=rollout), 512)
    table, block = traffic_blocks(large)
    assert block == 2 and table.shape == (256, 256) and table.sum() == large.traffic.total_bytes
    still = plan_run(config_for(tmp_path, {}, {}), 1)
    for number, drawn in enumerate((plan, large, still)):
        path = tmp_path / f"{number}.png"
        draw_heat_map(drawn, path)
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("world", "change", "fragments"),
    [
        (6, {}, ["teacher.parallel", "tp 2 x pp 2 x dp 1 = 4, but 6 ranks", "nearest"]),
        (4, {"distill": {"spool_bytes": 100}}, ["distill.spool_bytes: 100 may be below one micro-batch", "at least"]),
        (4, {"teacher": {"path": "/no/such/model"}}, ["/no/such/model", "no such model directory"]),
        (4, {"distill": {"layers": [7]}}, ["student layer 7", "out of range"]),
        (4, {"distill": {"bridge": "/no/bridge.safetensors"}}, ["distill.bridge", "cannot read"]),
    ],
)
def test_mistakes(tmp_path: Path, world: int, change: dict[str, Any], fragments: list[str]) -> None:
    """One line that says what and where."""
    config = config_for(tmp_path, {"tp": 2, "pp": 2}, {"tp": 2}, **change)
    with pytest.raises(UserError) as caught:
        plan_run(config, world)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_widths_need_a_bridge_or_its_rank(tmp_path: Path) -> None:
    """Without one the command says what to give; with a rank, states are that wide."""
    config = config_for(tmp_path, {"tp": 2}, {"tp": 2})
    write_config(tmp_path / "student", {**SMALL, "num_hidden_layers": 6, "hidden_size": 32})
    with pytest.raises(UserError, match=r"differ in width \(64 and 32\).*--bridge-rank"):
        plan_run(config, 2)
    plan = plan_run(config, 2, width=5)
    assert (plan.traffic.width, plan.traffic.state_bytes) == (5, 10)


def qwen(folder: Path) -> Path:
    """72B on tp 8 x pp 8 teaches 7B on tp 4 x pp 2, 1,024 rollouts of up to 5,120 tokens."""
    values = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(write_config(folder / "72b", QWEN_72B)), "parallel": {"tp": 8, "pp": 8, "sp": True}},
        "student": {
            "path": str(write_config(folder / "7b", QWEN_7B)), "parallel": {"tp": 4, "pp": 2, "sp": True},
            "recompute": {"granularity": "full"},
        },
        "rollout": {
            "prompts": {"path": "none.jsonl", "max_tokens": 1024}, "prompts_per_step": 128, "responses_per_prompt": 8,
            "max_response_tokens": 4096,
        },
        "optimizer": {"distributed": True},
    }  # fmt: skip
    return yaml_of(values, folder)


def test_a_thousand_ranks(tmp_path: Path) -> None:
    """72B to 7B on 1,024 ranks, from two config.json files; text, json and picture tell the same."""
    config, png, out = qwen(tmp_path), tmp_path / "links.png", tmp_path / "plan.json"
    result = oprd("plan", config, "--world-size", "1024", "--bridge-rank", "512", "--png", png, "--json", out)
    assert_done(result)
    assert png.read_bytes().startswith(b"\x89PNG")
    plan = json.loads(out.read_text())
    assert all(len(line) <= 100 for line in result.stdout.splitlines() if "/" not in line)
    assert row(result.stdout, "7 [ 896 897 898 899 900 901 902 903 ] 896-1023 layers 71-80, final norm")
    assert row(result.stdout, "1 [ 512 513 514 515 ] 512-1023 layers 15-28, final norm, head")
    assert row(result.stdout, "2 -> 0 8-11 <- 21, 24, 27, 30")
    assert plan["batch"]["num_tokens"] == 1024 * 2000
    assert sum(stage["states"] for stage in plan["traffic"]["stages"]) == 28 * 1024 * 2000
    assert plan["traffic"]["total_bytes"] == sum(link[2] for link in plan["traffic"]["links"])
    assert size(plan["traffic"]["total_bytes"]) in result.stdout
    assert sum(rank["num_ranks"] for rank in plan["ranks"]) == 1024
    numbers = [8 * stage["parameters"] for stage in plan["teacher"]["memory"]]
    norms = 7 * 8192 * (2 * 80 + 1)  # on each of the 8 tensor-parallel ranks
    padding = 8192 * (8 * 149 * 128 - 152064)  # of the embedding: 149 x 128 rows on a rank; there is no head
    assert sum(numbers) == 72_706_203_648 - 8192 * 152064 + norms + padding
    assert size(plan["teacher"]["memory"][0]["weights"]) in result.stdout


def test_needs_no_mcore(tmp_path: Path) -> None:
    """The command imports neither megatron nor transformers, and starts no process group."""
    script = (
        "import sys; from oprd_megatron.cli import app; "
        f"app(['plan', {str(qwen(tmp_path))!r}, '--world-size', '64', '--bridge-rank', '8'], standalone_mode=False); "
        "print([name for name in ('megatron', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    """Exit code 2, one line, nothing written."""
    config = yaml_of(values_for(tmp_path, {"tp": 2}, {"tp": 2}), tmp_path)
    assert_refused(oprd("plan", tmp_path / "other.yaml"), "other.yaml", "cannot read the config")
    assert_refused(oprd("plan", config, "--world-size", "3"), "student.parallel", "but 3 ranks")
    assert_refused(oprd("plan", config, "--png", tmp_path / "no" / "a.png"), "its directory does not exist")
    assert_refused(oprd("plan", config, "teacher.parallel.tpp=2"), "unknown key")
    assert_done(oprd("plan", config))
    assert not (tmp_path / "run").exists()
