"""The before-and-after text for the terminal."""

from oprd_megatron.evaluation.comparison import before_after_table, sample_answers


def _record(kl, cross_entropy, cosines, samples=()):
    layers = {"student": list(range(1, len(cosines) + 1)), "teacher": [2 * i for i in range(1, len(cosines) + 1)]}
    cosine = None if None in cosines else sum(cosines) / len(cosines)
    layers["cosine"] = cosines
    return {"kl": kl, "cross_entropy": cross_entropy, "cosine": cosine, "layers": layers, "samples": list(samples)}


def test_the_table_holds_before_after_and_change():
    """Each quantity's row is its own two figures and their difference, layers by their student and teacher ids."""
    table = before_after_table(_record(1.5, 2.25, [0.1, 0.3, 0.5, 0.7]), _record(0.5, 1.0, [0.9, 0.9, 0.8, 0.6]))
    lines = table.splitlines()
    assert lines[1].split("  ")[0] == "KL(teacher || student), nats per token"
    assert [line.split()[-3:] for line in lines[1:4]] == [
        ["1.5000", "0.5000", "-1.0000"],
        ["2.2500", "1.0000", "-1.2500"],
        ["0.4000", "0.8000", "+0.4000"],
    ]
    assert " ".join(lines[6].split()) == "1 <- 2 0.100 0.900 +0.800 3 <- 6 0.500 0.800 +0.300"
    assert " ".join(lines[7].split()) == "2 <- 4 0.300 0.900 +0.600 4 <- 8 0.700 0.600 -0.100"


def test_figures_that_were_not_finite_are_dashes():
    """A null of metrics.jsonl costs its own figure and the change, nothing else."""
    table = before_after_table(_record(None, 2.0, [0.1]), _record(0.5, 1.0, [None]))
    assert table.splitlines()[1].split()[-3:] == ["-", "0.5000", "-"]
    assert " ".join(table.splitlines()[6].split()) == "1 <- 2 0.100 - -"


def test_the_text_fits_a_hundred_columns():
    """80 layers and long answers stay within 100 columns."""
    long = {"prompt": "why " * 60, "response": "x" * 450, "teacher": "Because.\n\nIt is so."}
    record = _record(12.5, 12.5, [-0.123] * 80, [long])
    for text in (before_after_table(record, record), sample_answers(record, record)):
        assert max(map(len, text.splitlines())) <= 100


def test_answers_are_shown_in_order_and_at_most_three():
    """Prompt, before, after, teacher, for the first three prompts; nothing where an evaluation holds no samples."""
    before = _record(1, 1, [1.0], [{"prompt": f"p{i}", "response": f"b{i}", "teacher": f"t{i}"} for i in range(4)])
    after = _record(1, 1, [1.0], [{"prompt": f"p{i}", "response": f"a{i}", "teacher": f"t{i}"} for i in range(4)])
    blocks = sample_answers(before, after).split("\n\n")
    assert [block.split() for block in blocks] == [
        ["prompt", f"p{i}", "before", f"b{i}", "after", f"a{i}", "teacher", f"t{i}"] for i in range(3)
    ]
    assert sample_answers(_record(1, 1, [1.0]), after) == ""


def test_an_answer_cannot_steer_the_terminal():
    """Escape sequences and carriage returns in a model's text are shown, not sent."""
    record = _record(1, 1, [1.0], [{"prompt": "p", "response": "\x1b[2Jgone\rover", "teacher": "t"}])
    text = sample_answers(record, record)
    assert "\x1b" not in text and "\r" not in text and "gone" in text
