"""Prompt files: every format gives the same prompts, every mistake is one line that names its place."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from oprd_megatron.config.rollout import PromptsConfig
from oprd_megatron.errors import DataError
from oprd_megatron.rollout import Prompt, load_prompts, refuse_overlap
from tests.cross_tokenizer.cross_runs import tokenizer_of
from tests.tiny_models import tiny_tokenizer

TEXTS = ["Say hi.", "Où est 7+5?\nThink.", "日本"]
MESSAGES = [[{"role": "user", "content": text}] for text in TEXTS]
TOKENIZER = tiny_tokenizer()


def write(path: Path, values: list[Any], field: str = "prompt") -> Path:
    rows = [{"id": index, field: value} for index, value in enumerate(values)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path, **config: Any) -> list[Prompt]:
    return load_prompts(PromptsConfig(path=path, **config), TOKENIZER)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("values", [TEXTS, MESSAGES], ids=["strings", "messages"])
def test_every_format_gives_the_templates_ids(tmp_path: Path, suffix: str, values: list[Any]) -> None:
    """In each format, a string and a list with one user message are the same prompt: the chat template's."""
    prompts = load(write(tmp_path / f"p{suffix}", values, "q"), field="q")
    assert [prompt.text for prompt in prompts] == TEXTS
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    for prompt, messages in zip(prompts, MESSAGES, strict=True):
        expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        assert list(prompt.token_ids) == expected["input_ids"]


def test_raw_text_is_the_tokenizers_own_encoding(tmp_path: Path) -> None:
    """chat_template: false adds nothing to what the tokenizer makes of the text, and needs no template."""
    path = write(tmp_path / "p.jsonl", TEXTS)
    bare = tiny_tokenizer(chat_template=False)
    prompts = load_prompts(PromptsConfig(path=path, chat_template=False), bare)
    assert [list(prompt.token_ids) for prompt in prompts] == [bare(text)["input_ids"] for text in TEXTS]


def test_several_messages_keep_their_roles(tmp_path: Path) -> None:
    """A system message and a conversation reach the template in order, and the display text names the roles."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (prompt,) = load(write(tmp_path / "p.parquet", [talk]))
    decoded = TOKENIZER.decode(prompt.token_ids)
    assert decoded == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == "system: Be brief.\nuser: Hi"


def test_equal_rows_stay_and_share_their_ids(tmp_path: Path) -> None:
    """Repeated rows are all kept, with one tuple of ids between them, also across reading chunks."""
    prompts = load(write(tmp_path / "p.parquet", ["a", "b"] * 1500))
    assert len(prompts) == 3000
    assert len({id(prompt.token_ids) for prompt in prompts}) == 2


def test_limit_stops_the_reading(tmp_path: Path) -> None:
    """Rows after the limit are not even parsed."""
    path = write(tmp_path / "p.jsonl", TEXTS)
    path.write_text(path.read_text() + "not json\n")
    assert len(load(path, limit=3)) == 3


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts over max_tokens go, the rest is numbered anew, the count is logged; none left is an error."""
    path = write(tmp_path / "p.jsonl", ["x" * 50, "ok"])
    with caplog.at_level(logging.WARNING):
        (prompt,) = load(path, max_tokens=40)
    assert (prompt.index, prompt.text) == (0, "ok")
    assert f"{path}: left out 1 of 2 prompts, over 40 tokens" in caplog.text
    with pytest.raises(DataError, match=r"all 2 prompts are over max_tokens 3"):
        load(path, max_tokens=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl:3: not valid JSON"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"text": "a", "id": 1}\n',
            r"p\.jsonl:2: no field 'prompt'; the fields are text, id",
        ),
        ("p.jsonl", b'["a"]\n', r"p\.jsonl:1: holds a list, expected an object"),
        ("p.jsonl", b'{"prompt": 7}\n', r"p\.jsonl:1: 'prompt' must be a string or a list of chat messages"),
        ("p.jsonl", b'{"prompt": []}\n', r"p\.jsonl:1: 'prompt' is empty"),
        ("p.jsonl", b'{"prompt": " "}\n', r"p\.jsonl:1: 'prompt' is empty"),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', r"p\.jsonl:1: 'prompt' must be"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', r"p\.jsonl:1: not UTF-8"),
        ("p.jsonl", b"", r"p\.jsonl: holds no prompts"),
        ("p.json", b"[]", r"p\.json: holds no prompts"),
        ("p.json", b'{"prompt": "a"}', r"p\.json: holds an object, expected a list"),
        ("p.json", b'[{"prompt": "a"},\n {"prompt" 1}]', r"p\.json: not valid JSON \(.*, line 2, column 12\)"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": null}]', r"p\.json: item 2: 'prompt' must be"),
        ("p.json", b"", r"p\.json: not valid JSON"),
        ("p.parquet", b"junk", r"p\.parquet: not a parquet file"),
        ("p.parquet", b"", r"p\.parquet: not a parquet file"),
        ("p.txt", b"hello", r"p\.txt: unknown kind of prompt file '\.txt'; use one of \.jsonl, \.json, \.parquet"),
    ],
)
def test_mistakes_name_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Each malformed file is one line with file, line and reason."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_mistakes(tmp_path: Path) -> None:
    """A missing file, a missing column, messages without a template, and a template that refuses."""
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no column 'q'; the columns are id, prompt"):
        load(write(tmp_path / "p.parquet", TEXTS), field="q")
    chat = write(tmp_path / "chat.jsonl", MESSAGES)
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*set chat_template: true"):
        load(chat, chat_template=False)
    with pytest.raises(DataError, match="no chat template; set chat_template: false"):
        load_prompts(PromptsConfig(path=chat), tiny_tokenizer(chat_template=False))
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*refuses this prompt \(roles must alternate\)"):
        load_prompts(PromptsConfig(path=chat), strict)


def test_overlap_is_refused() -> None:
    """One shared prompt is enough, and it is named; disjoint lists pass."""
    train = [Prompt(0, "a", (1, 2)), Prompt(1, "b", (3,))]
    refuse_overlap(train, [Prompt(0, "c", (1,))], "held.jsonl")
    with pytest.raises(DataError, match=r"held\.jsonl: 1 of 2 held-out prompts .* the first is 'b'"):
        refuse_overlap(train, [Prompt(0, "c", (1,)), Prompt(1, "b", (3,))], "held.jsonl")


def test_shipped_prompts_load_and_are_disjoint() -> None:
    """The quick start's two files are valid, of the promised size, and share no prompt."""
    data = Path(__file__).parents[2] / "examples" / "data"
    train, held_out = load(data / "quickstart_train.jsonl"), load(data / "quickstart_heldout.jsonl")
    assert (len(train), len(held_out)) == (240, 32)
    refuse_overlap(train, held_out, data)
    assert len({prompt.token_ids for prompt in train + held_out}) == 272


def brackets() -> PreTrainedTokenizerFast:
    """A teacher's tokenizer: other ids than the tiny one's, and a longer chat template."""
    return tokenizer_of(
        "gemma_like", "{% for m in messages %}" + "[{{ m['role'] }}] " * 3 + "{{ m['content'] }}{% endfor %}"
    )


def test_a_teacher_reads_each_prompt_its_own_way(tmp_path: Path) -> None:
    """`teacher_ids` are the teacher's chat template in the teacher's tokens, `token_ids` the student's, in the file's order and
    across reading chunks, also where rows repeat; without a teacher there are none."""
    teacher = brackets()
    texts = [f"{TEXTS[number % 3]} {number % 700}" for number in range(1500)]
    path = write(tmp_path / "p.jsonl", texts)
    prompts = load_prompts(PromptsConfig(path=path), TOKENIZER, teacher)
    assert [(prompt.index, prompt.text) for prompt in prompts] == list(enumerate(texts))
    for prompt in [*prompts[:4], *prompts[1020:1028], prompts[-1]]:
        messages = [{"role": "user", "content": prompt.text}]
        for tokenizer, ids in ((TOKENIZER, prompt.token_ids), (teacher, prompt.teacher_ids)):
            assert (
                list(ids)
                == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            )
    assert all(prompt.teacher_ids == () for prompt in load(path))


def test_raw_text_is_each_tokenizers_own_encoding(tmp_path: Path) -> None:
    """chat_template: false needs neither template; each tokenizer adds its own special tokens to a text."""
    teacher = tokenizer_of("byte_level", template=None)
    backend = teacher.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", teacher.bos_token_id)]
    )
    path = write(tmp_path / "p.jsonl", TEXTS)
    prompts = load_prompts(PromptsConfig(path=path, chat_template=False), tiny_tokenizer(chat_template=False), teacher)
    for prompt, text in zip(prompts, TEXTS, strict=True):
        assert prompt.teacher_ids == (teacher.bos_token_id, *teacher(text, add_special_tokens=False)["input_ids"])
        assert prompt.token_ids == tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_a_prompt_too_long_for_either_is_left_out_of_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The limit holds for both readings; what stays is numbered anew and keeps its own two readings."""
    texts = ["ab", "the cat sat on the mat", "日本語", "x" * 12, "ok"]
    path = write(tmp_path / "p.jsonl", texts)
    bare = tokenizer_of("gemma_like", "{{ messages[0]['content'] }}")
    student = tiny_tokenizer()
    student.chat_template = "{{ messages[0]['content'] }}"
    both = [(len(student(text)["input_ids"]), len(bare(text, add_special_tokens=False)["input_ids"])) for text in texts]
    for pair in ((student, bare), (bare, student)):  # the cat is short for the one with words, whoever that is
        with caplog.at_level(logging.WARNING):
            prompts = load_prompts(PromptsConfig(path=path, max_tokens=11), *pair)
        assert [prompt.text for prompt in prompts] == [
            text for text, n in zip(texts, both, strict=True) if max(n) <= 11
        ]
        assert [prompt.index for prompt in prompts] == list(range(len(prompts))) and 2 <= len(prompts) < 5
        for prompt in prompts:
            read = [tuple(each(prompt.text, add_special_tokens=False)["input_ids"]) for each in pair]
            assert [prompt.token_ids, prompt.teacher_ids] == read
    assert any(theirs <= 11 < mine for mine, theirs in both)
    assert "left out 2 of 5 prompts, over 11 tokens" in caplog.text


def test_a_missing_chat_template_says_whose(tmp_path: Path) -> None:
    """One line names the student's or the teacher's tokenizer; with one tokenizer there is no question."""
    path = write(tmp_path / "p.jsonl", TEXTS)
    bare = tiny_tokenizer(chat_template=False)
    for student, teacher, whose in (
        (TOKENIZER, bare, " of the teacher"),
        (bare, TOKENIZER, " of the student"),
        (bare, None, ""),
    ):
        with pytest.raises(
            DataError, match=f"the tokenizer{whose} has no chat template; set chat_template: false"
        ) as caught:
            load_prompts(PromptsConfig(path=path), student, teacher)
        assert "\n" not in str(caught.value)
