"""The HTML report, from full, partial and missing runs."""

import math
import warnings
from html.parser import HTMLParser

import pytest

from oprd_megatron.errors import UserError
from oprd_megatron.evaluation.report import write_report
from oprd_megatron.logging import JsonlLogger

SECTIONS = {
    "headlines",
    "held-out-distance-to-the-teacher",
    "training-loss",
    "cosine-per-layer",
    "layers-at-the-end",
    "next-token-distributions",
    "responses",
    "time",
    "optimizer",
    "samples",
    "facts",
    "config",
}
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


class Page(HTMLParser):
    """Ids, tags, text and every attribute that could fetch something."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.tags, self.links, self.text = set(), [], [], ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)

    def handle_data(self, data):
        self.text += data


def test_a_whole_run_fills_every_section(tmp_path):
    """All sections and ten figures are there, and the headline figures are those of the first and last evaluation."""
    path = write_report(write_run(tmp_path / "demo", full_records()))
    page = Page(path)
    assert path == tmp_path / "demo" / "report.html"
    assert page.ids >= SECTIONS | {"terms-of-the-loss", "along-a-response"}
    assert page.tags.count("svg") == 10
    assert "Not measured" not in page.text
    for figure in ("1.100 →", "0.182", "-0.918 (-83%)", "30 of 30 steps, finished", "5 min 02 s", "3.00 GiB", "demo"):
        assert figure in page.text
    assert "I am blue da ba dee." in page.text and "Short wavelengths scatter more." in page.text
    assert "path: models/teacher" in page.text


def test_the_page_asks_the_network_for_nothing(tmp_path):
    """No absolute address occurs in the page, and what its elements link to is inside it."""
    page = Page(write_report(write_run(tmp_path, full_records())))
    assert "http://" not in page.source and "https://" not in page.source and "@import" not in page.source
    assert page.links and all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


@pytest.mark.parametrize(
    ("records", "figures", "extra"),
    [
        ([eval_record(0)], 3, {"along-a-response"}),
        ([train_record(1)], 6, {"terms-of-the-loss"}),
        ([eval_record(0), train_record(1)], 8, {"along-a-response", "terms-of-the-loss"}),
        ([{"kind": "train", "step": 1, "loss": None}], 3, set()),
        ([train_record(step) for step in range(1, 101)], 6, {"terms-of-the-loss"}),
        ([eval_record(0, student_entropy=None, curves=None)], 2, set()),
        (
            [{"kind": "summary", "step": 0, "wall_seconds": 1.0, "peak_memory_bytes": 1, "ranks": 1, "export": None}],
            0,
            set(),
        ),
    ],
)
def test_a_partial_run_shows_what_there_is(tmp_path, records, figures, extra):
    """Every section stands, and says so where nothing was measured; two stand only where they were."""
    page = Page(write_report(write_run(tmp_path, records, config="")))
    assert page.ids >= SECTIONS | extra
    assert not page.ids & ({"along-a-response", "terms-of-the-loss"} - extra)
    assert page.tags.count("svg") == figures + len(extra)
    assert page.text.count("Not measured") == 8 - figures + 1


def test_a_student_that_equals_its_teacher_can_be_shown(tmp_path):
    """Loss 0, cosine 1 and MSE 0 at every layer draw without a warning (no log of zero, no empty colour range)."""
    train = {**train_record(1), "loss": 0.0}
    train["layers"] = {**train["layers"], "cosine": [1.0] * NUM_LAYERS, "mse": [0.0] * NUM_LAYERS}
    train["terms"], train["gradient_norms"] = {"full": 0.0}, {"oprd": 0.0, "full": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(write_report(write_run(tmp_path, [train, {**train, "step": 2}])))
    assert page.tags.count("svg") == 7


def test_a_running_run_is_read_up_to_its_last_whole_line(tmp_path):
    """A line that is being written is left out, and the page says that the run has not finished."""
    run_dir = write_run(tmp_path, [train_record(1), train_record(2)])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","st')
    assert "2 of 30 steps, not finished when this page was written" in Page(write_report(run_dir)).text


def test_the_summary_of_an_earlier_end_does_not_finish_an_extended_run(tmp_path):
    """A run that ended at step 2 and goes on is not finished."""
    ended = [train_record(1), train_record(2), {**full_records(2)[-1], "step": 2}]
    assert "finished." in Page(write_report(write_run(tmp_path / "ended", ended))).text
    extended = Page(write_report(write_run(tmp_path / "extended", [*ended, train_record(3)]))).text
    assert "3 of 30 steps, not finished" in extended


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
