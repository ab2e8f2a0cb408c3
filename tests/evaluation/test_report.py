"""The HTML report, from full, partial and missing runs."""

import json
import math
import re
import warnings
from html.parser import HTMLParser

import pytest

from oprd_megatron.errors import UserError
from oprd_megatron.evaluation.plots import loss_plot
from oprd_megatron.evaluation.report import write_report
from oprd_megatron.evaluation.run_records import RunRecords, Status
from oprd_megatron.logging import JsonlLogger

EVALUATED = {"held-out-distance-to-the-teacher", "cosine-per-layer", "next-token-distributions", "along-a-response"}
TRAINED = {
    "training-loss",
    "cosine-per-layer",
    "layers-at-the-end",
    "terms-of-the-loss",
    "responses",
    "time",
    "memory",
    "optimizer",
}
ALWAYS = {"headlines", "samples", "facts", "plan", "config"}
CONFIG = "run:\n  dir: runs/demo\n  steps: 30\nteacher:\n  path: models/teacher\nstudent:\n  path: models/student\n"
NUM_LAYERS = 12
PHASES = {"rollout": 4.0, "teacher": 1.5, "exchange": 0.3, "student": 2.5, "optimizer": 0.4, "sync": 0.2, "probe": 0.1}


def train_record(step):
    """A training record as the trainer writes it."""
    left = math.exp(-step / 10)
    students = list(range(1, NUM_LAYERS + 1))
    return {
        "kind": "train",
        "step": step,
        "loss": 0.02 + 0.8 * left,
        "cosine": 0.97 - 0.6 * left,
        "lr": 1e-4 * min(step / 3, 1) * (1 + math.cos(math.pi * step / 30)) / 2,
        "grad_norm": 0.4 + 2 * left * (1 + 0.3 * math.sin(step)),
        "response_length": {"mean": 40 + 5 * math.sin(step / 2), "max": 64, "finished": 0.6 + 0.01 * step},
        "supervised_tokens": 640,
        "tokens_per_second": 71.0 + step % 3,
        "seconds": {name: value * (1 + 0.1 * math.sin(step + value)) for name, value in PHASES.items()},
        "memory_mib": {"held": [900 + step, 1000], "peak": [1000 + step, 1200]},
        "probe_difference": 1e-5,
        "weight_version": step,
        "terms": {"full": 0.1 + left},
        "gradient_norms": {"oprd": 2 * left, "full": left},
        "layers": {
            "student": students,
            "teacher": [2 * layer for layer in students],
            "cosine": [0.99 - (0.3 + 0.04 * layer) * left for layer in students],
            "mse": [0.1 * layer * (0.1 + left) for layer in students],
            "norm_ratio": [1 + 0.5 * left + 0.02 * layer for layer in students],
        },
    }


def eval_record(step, **values):
    """An evaluation record as the trainer writes it."""
    train = train_record(step)
    left = math.exp(-step / 12)
    layers = {key: train["layers"][key] for key in ("student", "teacher", "cosine")}
    return {
        "kind": "eval",
        "step": step,
        "kl": 0.1 + left,
        "cross_entropy": 1.2 + left,
        "cosine": train["cosine"],
        "student_entropy": 3 - left,
        "teacher_entropy": 2.5,
        "top_overlap": 0.9 - left / 2,
        "terms": {"oprd": left, "full": 0.1 + left},
        "tokens": 2048,
        "seconds": 3.0,
        "layers": layers,
        "curves": {"k": [1, 2, 4, 8], "first": [None, 0.8, 0.85, 0.9], "last": [0.7, 0.75, 0.85, 0.9]},
        **values,
    }


def benchmark_record(step):
    """A benchmark in the loop as `InLoop` writes it."""
    measured = {"accuracy": 0.3 + step / 100, "best": 0.8, "accuracy_half_interval": 0.1 if step else None}
    return {
        "kind": "benchmark",
        "step": step,
        "seconds": 2.0,
        "benchmarks": {"aime": measured, "math": measured, "all": {}},
    }


def sample(response):
    """One sample answer."""
    return {
        "prompt": "Why is the sky blue? Answer in one sentence.",
        "response": response,
        "teacher": "Air scatters short wavelengths of sunlight more than long ones, so the sky looks blue.",
    }


def write_run(run_dir, records, config=CONFIG):
    """A run directory that holds these records."""
    logger = JsonlLogger(run_dir / "metrics.jsonl")
    for record in records:
        logger.log(record)
    logger.close()
    if config:
        (run_dir / "config.yaml").write_text(config)
    return run_dir


def full_records(steps=30):
    """What a whole run writes."""
    records = [eval_record(0, samples=[sample("The the the sky."), sample("I am blue da ba dee.")])]
    for step in range(1, steps + 1):
        records.append(train_record(step))
        if step % 10 == 0 and step < steps:
            records.append(eval_record(step))
    after = [sample("Because sunlight is scattered by the air."), sample("Short wavelengths scatter more.")]
    records.append(eval_record(steps, samples=after))
    summary = {"wall_seconds": 301.5, "peak_memory_bytes": 3 * 2**30, "ranks": 2, "export": "runs/demo/student_hf"}
    return [*records, {"kind": "summary", "step": steps, **summary}]


STOPPED = {"kind": "stopped", "step": 2, "reason": "SIGTERM came"}
SUMMARY = {"kind": "summary", "step": 2, "wall_seconds": 9.0, "peak_memory_bytes": 1, "ranks": 1, "export": None}


class Page(HTMLParser):
    """Ids, sections with figures, tags, text, what figures say in words, and every attribute that could fetch something."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.figures, self.tags, self.links, self.spoken, self.text = set(), set(), [], [], [], ""
        self.source, self.section = path.read_text(), ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
                self.section = value if tag == "section" else self.section
            if (name, value) == ("class", "panels"):
                self.figures.add(self.section)
            if tag == "svg" and name == "aria-label":
                self.spoken.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of a whole run."""
    return write_report(write_run(tmp_path_factory.mktemp("full") / "demo", full_records()))


def test_a_whole_run_fills_every_section(full):
    """All sections are there with their figures, and the headline figures are those of the first and last evaluation."""
    page = Page(full)
    assert full.parts[-2:] == ("demo", "report.html")
    assert page.ids >= ALWAYS and page.figures == EVALUATED | TRAINED
    assert page.tags.count("svg") == 4 + 2 * 9 + 3 == len(page.spoken)
    assert "Not measured" not in page.text
    for figure in ("1.100 →", "0.182", "-0.918 (-83%)", "step 30 of 30, in 5 min 02 s", "3.00 GiB", "demo"):
        assert figure in page.text
    assert "I am blue da ba dee." in page.text and "Short wavelengths scatter more." in page.text
    assert "path: models/teacher" in page.text


def test_figures_say_in_words_what_they_show(full):
    """Title, axis, and where each line begins and ends; guides to the eye are not read out."""
    spoken = Page(full).spoken
    assert "loss, over step; from 0.744 to 0.0598" in spoken
    assert (
        "norm ratio, student / teacher, over student layer; step 1 from 1.47 to 1.69; step 30 from 1.04 to 1.26"
        in spoken
    )
    assert "held after a step, GiB, over step; rank 0 from 0.88 to 0.908; rank 1 from 0.977 to 0.977" in spoken


def test_benchmarks_in_the_loop_have_a_figure(tmp_path):
    """Each benchmark is a line; what they come to together is not another one."""
    records = [benchmark_record(0), train_record(1), benchmark_record(10)]
    page = Page(write_report(write_run(tmp_path, records)))
    assert "benchmarks" in page.figures
    assert "Best@k, over step; aime from 0.8 to 0.8; math from 0.8 to 0.8" in page.spoken


def test_a_long_run_is_drawn_in_pieces():
    """Ten times the steps make no larger figure; a step that stands out among them stays inside the scale."""
    figures = []
    for steps in (1000, 10_000):
        records = [{"kind": "train", "step": step, "loss": 1 + step % 7, "cosine": 0.5} for step in range(1, steps + 1)]
        records[501]["loss"] = 3000.0
        figures.append(loss_plot(records))
        assert ">2000<" in figures[-1]
    assert len(figures[1]) < 1.2 * len(figures[0])


def test_environment_and_plan_are_shown(tmp_path):
    """What `open_run` wrote."""
    run_dir = write_run(tmp_path, [train_record(1)])
    (run_dir / "plan.txt").write_text("TEACHER  llama <b>, 5 layers")
    found = {
        "started": "2026-11-22T17:00:56+00:00",
        "ranks": 3,
        "hosts": {"node1": 2, "node2": 1},
        "device": "cpu (x86_64)",
    }
    found |= {"python": "3.11.7", "commit": None, "versions": {"torch": "2.13.0+cpu"}}
    (run_dir / "environment.json").write_text(json.dumps(found))
    text = Page(write_report(run_dir)).text
    for shown in (
        "TEACHER  llama <b>",
        "2026-11-22 17:00:56 UTC",
        "node1 (2), node2 (1)",
        "not from a git",
        "2.13.0+cpu",
    ):
        assert shown in text


def test_the_page_asks_the_network_for_nothing(full):
    """No absolute address occurs in the page, and what its elements link to is inside it."""
    page = Page(full)
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source
    assert page.links and all(link.startswith(("#", "data:,", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "iframe", "object"} & set(page.tags)


@pytest.mark.parametrize(
    ("records", "figures"),
    [
        ([eval_record(0)], EVALUATED),
        ([train_record(1)], TRAINED),
        ([eval_record(0), train_record(1)], EVALUATED | TRAINED),
        ([{"kind": "train", "step": 1, "loss": None}], {"training-loss", "responses", "optimizer"}),
        ([train_record(step) for step in range(1, 101)], TRAINED),
        ([eval_record(0, student_entropy=None, curves=None)], {"held-out-distance-to-the-teacher", "cosine-per-layer"}),
        (
            [{"kind": "summary", "step": 0, "wall_seconds": 1.0, "peak_memory_bytes": 1, "ranks": 1, "export": None}],
            set(),
        ),
    ],
)
def test_a_partial_run_shows_what_there_is(tmp_path, records, figures):
    """Only what was measured has a section; what most runs have and this one has not is named."""
    page = Page(write_report(write_run(tmp_path, records, config="")))
    assert page.figures == figures and page.ids >= ALWAYS
    missing = (
        page.text.split("Not measured in this run so far: ")[1].split(".")[0] if "Not measured" in page.text else ""
    )
    slugs = {name.lower().replace(" ", "-") for name in missing.split(", ") if name}
    assert slugs == (EVALUATED | TRAINED) - figures - {"along-a-response", "terms-of-the-loss"}


def test_a_student_that_equals_its_teacher_can_be_shown(tmp_path):
    """Loss 0, cosine 1 and MSE 0 at every layer draw without a warning (no log of zero, no empty colour range)."""
    train = {**train_record(1), "loss": 0.0}
    train["layers"] = {**train["layers"], "cosine": [1.0] * NUM_LAYERS, "mse": [0.0] * NUM_LAYERS}
    train["terms"], train["gradient_norms"] = {"full": 0.0}, {"oprd": 0.0, "full": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(write_report(write_run(tmp_path, [train, {**train, "step": 2}])))
    assert page.figures == TRAINED


def test_a_running_run_is_read_up_to_its_last_whole_line(tmp_path):
    """A line that is being written is left out, and the page says that the run has not finished."""
    run_dir = write_run(tmp_path, [train_record(1), train_record(2)])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","st')
    assert re.search(r"running\s+step 2 of 30, about 4 min \d\d s left", Page(write_report(run_dir)).text)


@pytest.mark.parametrize(
    ("records", "age", "state", "detail"),
    [
        ([train_record(2)], 5.0, "running", "step 2 of 30, about 4 min"),
        ([eval_record(0)], 5.0, "running", "step 0 of 30"),
        ([train_record(2)], 3000.0, "quiet", "step 2 of 30; the last record is 50 min 00 s old"),
        ([train_record(2), STOPPED], 3000.0, "stopped", "step 2 of 30, because SIGTERM came; the same command goes on"),
        ([train_record(2), STOPPED, train_record(3)], 5.0, "running", "step 3 of 30"),
        ([train_record(2), SUMMARY, train_record(3)], 5.0, "running", "step 3 of 30"),
        ([train_record(2), SUMMARY], 5.0, "stopped", "step 2 of 30, as run.stop_at asks"),
        ([train_record(30), {**SUMMARY, "step": 30}], 3000.0, "finished", "step 30 of 30, in 9.0 s"),
    ],
)
def test_a_status_says_how_far_a_run_is_and_how_it_ended(tmp_path, records, age, state, detail):
    """A word and a sentence, from the last records and their age."""
    status = Status.of(RunRecords.read(write_run(tmp_path, records)), 30, age)
    assert status.state == state and status.detail.startswith(detail)
    assert status.done == records[-1]["step"] / 30


def test_the_time_left_counts_evaluations(tmp_path):
    """Ten of 30 steps of 9 s, two evaluations of 3 s and a benchmark of 2 s on the way: 20 x 9.8 s are left."""
    steps = [{"kind": "train", "step": step, "seconds": {"student": 9.0}} for step in range(1, 11)]
    records = write_run(tmp_path, [eval_record(0), *steps, eval_record(10), benchmark_record(10)])
    assert RunRecords.read(records).seconds_left(30) == pytest.approx(20 * 9.8)


def test_text_from_models_and_configs_stays_text(tmp_path):
    """Markup in a prompt, an answer, the config or a layer's phase name makes no element."""
    bad = "</div><script>alert(1)</script><img src=x onerror=alert(1)>"
    record = eval_record(0, samples=[{"prompt": bad, "response": bad, "teacher": bad}])
    train = {**train_record(1), "seconds": {bad: 1.0}}
    page = Page(write_report(write_run(tmp_path, [record, train, record], config=f"run: {{dir: '{bad}'}}\n")))
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_a_directory_without_metrics_is_refused_in_one_line(tmp_path):
    """The message names the file and what to give; nothing is written."""
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read the metrics") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no record yet"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
