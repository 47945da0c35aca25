"""Prompts in the shapes that data sets are published in, chats, and several files."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet
import pytest

from megatron_occ.data.chat import ChatFormat
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import (
    PromptFile,
    PromptOptions,
    PromptRecord,
    read_prompt_file,
    read_prompts,
    without,
)
from megatron_occ.data.records import read_records

CHAT = [{"role": "user", "content": "1+1?"}]
# a record as published, its prompt, its answer, and how it is told
SHAPES = {
    "GSM8K": (
        {"question": "1+1?", "answer": "So 1+1=<<1+1=2>>2.\n#### 2"},
        ("1+1?", "2", "question, answer"),
    ),
    "DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": CHAT,
            "reward_model": {"ground_truth": "2", "style": "rule"},
        },
        ("<user>1+1?<model>", "2", "prompt, reward_model.ground_truth, data_source"),
    ),
    "MATH": (
        {"problem": "1+1?", "level": "Level 1", "solution": "It is $\\boxed{2}$."},
        ("1+1?", "2", "problem, solution"),
    ),
    "MATH-500": (
        {"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "level": 1},
        ("1+1?", "2", "problem, answer"),
    ),
    "AIME 2024": (
        {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "...", "Answer": 2},
        ("1+1?", "2", "Problem, Answer"),
    ),
    "AIME 2025": (
        {"problem_idx": 1, "problem": "1+1?", "answer": 2},
        ("1+1?", "2", "problem, answer"),
    ),
    "AMC": (
        {"id": 0, "problem": "1+1?", "answer": 27.0, "question": "1+1?"},
        ("1+1?", "27", "problem, answer"),
    ),
    "Minerva": (
        {"problem": "1+1?", "solution": "\\boxed{1} no, $x=\\boxed{2}$ and $\\boxed{3}$", "idx": 0},
        ("1+1?", "2, 3", "problem, solution"),
    ),
    "OlympiadBench": (
        {"question": "1+1?", "solution": ["..."], "final_answer": ["2", "$3$"], "unit": None},
        ("1+1?", "2, $3$", "question, final_answer"),
    ),
    "plain": ({"prompt": "1+1?", "answer": 0.5}, ("1+1?", "0.5", "prompt, answer")),
    "chat of parts": (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
            "answer": "2",
        },
        ("<user>1+1?<model>", "2", "messages, answer"),
    ),
}


class Angular:
    """A chat template."""

    def chat(self, messages, **kwargs):
        turns = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return turns + "".join(f"<{name}={value}>" for name, value in kwargs.items()) + "<model>"


def options(**chat):
    return PromptOptions(verifiers=("math_dapo",), chat=ChatFormat(template=Angular(), **chat))


def as_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def as_json(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")


def as_data(path, records):
    path.write_text(json.dumps({"version": 1, "data": records}), encoding="utf-8")


def as_parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("ending", "write"),
    [(".jsonl", as_jsonl), (".json", as_json), (".json", as_jsonl), (".parquet", as_parquet)],
)
def test_a_published_shape_is_recognised(name, ending, write, tmp_path):
    published, (prompt, answer, told) = SHAPES[name]
    path = tmp_path / f"set{ending}"
    write(path, [published, published])
    file = read_prompt_file(path, options())
    assert [(record.prompt, record.answer) for record in file.records] == [(prompt, answer)] * 2
    assert file.description == f"2 prompts from {path} ({told})"
    verifier = "math_dapo" if name.startswith("DAPO") else "math"
    assert {record.task_name for record in file.records} == {verifier}


def test_places_are_lines_or_records(tmp_path):
    records = [{"prompt": "p", "answer": "1"}] * 2
    for ending, write, places in (
        (".jsonl", as_jsonl, (":1", ":2")),
        (".json", as_data, (", record 1", ", record 2")),
        (".parquet", as_parquet, (", record 1", ", record 2")),
    ):
        path = tmp_path / f"set{ending}"
        write(path, records)
        assert [r.place for r in read_records(path)] == [f"{path}{place}" for place in places]


def test_fields_can_be_named(tmp_path):
    path = tmp_path / "set.jsonl"
    as_jsonl(path, [{"prompt": "no", "task": {"text": "1+1?"}, "gold": 2, "by": "exact"}])
    fields = {"prompt": "task.text", "answer": "gold", "task_name": "by"}
    (record,) = read_prompts(path, PromptOptions(fields=fields))
    assert (record.prompt, record.answer, record.task_name) == ("1+1?", "2", "exact")
    fields["answer"] = "golden"
    with pytest.raises(
        ValueError, match=r"set\.jsonl:1: no data\.fields\.answer=golden; the record"
    ):
        read_prompts(path, PromptOptions(fields=fields))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1]", r"a\.json, record 1: expected an object, got int"),
        ("a.json", b"[]", r"a\.json: no record in it"),
        ("a.json", b"3", r"a\.json: expected a list of objects, got int"),
        ("a.json", b'{"train": [], "test": []}', r"a\.json: has lists train and test"),
        ("a.json", b'{"prompt": "p",\n', r"a\.json:1: not JSON"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file that can be read"),
    ],
)
def test_files_that_are_not_what_their_name_says(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "p", "answer": "1"}).encode())
    assert read_prompts(path)[0].prompt == "p"


@pytest.mark.parametrize(
    ("chat", "prompt", "text"),
    [
        ({}, CHAT, "<user>1+1?<model>"),
        ({}, "1+1?", "1+1?"),
        ({"always": True}, "1+1?", "<user>1+1?<model>"),
        ({"always": True, "system": "Be brief."}, "1+1?", "<system>Be brief.<user>1+1?<model>"),
        ({"suffix": " Box it."}, CHAT, "<user>1+1? Box it.<model>"),
        ({"suffix": " Box it."}, "1+1?", "1+1? Box it."),
        ({"kwargs": {"think": False}}, CHAT, "<user>1+1?<think=False><model>"),
    ],
)
def test_text_around_a_prompt(chat, prompt, text):
    assert ChatFormat(template=Angular(), **chat).text(prompt) == text


@pytest.mark.parametrize(
    ("chat", "prompt", "message"),
    [
        ({"template": None}, CHAT, "the tokenizer has no template"),
        ({"system": "s"}, "1+1?", r"data\.chat\.system has no effect: the prompt is text"),
        ({"kwargs": {"a": 1}}, "1+1?", r"data\.chat\.kwargs has no effect"),
        (
            {"system": "s"},
            [{"role": "system", "content": "t"}, *CHAT],
            "a system message of its own",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(chat, prompt, message):
    with pytest.raises(ValueError, match=message):
        ChatFormat(**{"template": Angular(), **chat}).text(prompt)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the last message must be the user's, got nothing"),
        ([*CHAT, {"role": "assistant", "content": "2"}], "must be the user's, got assistant"),
        ([{"content": "1+1?"}], r"\[0\] must be a message with role and content"),
        ([{"role": "user", "content": [{"image": "x"}]}], "parts that are no text"),
        ([{"role": "user", "content": None}], r"\[0\]\.content must be text, got NoneType"),
    ],
)
def test_chats_that_can_not_be_continued(messages, message, tmp_path):
    path = tmp_path / "chat.jsonl"
    as_jsonl(path, [{"messages": messages, "answer": "2"}])
    with pytest.raises(ValueError, match=rf"chat\.jsonl:1: 'messages'.*{message}"):
        read_prompts(path, options())


def test_repeated_prompts_are_left_out_and_counted(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    as_jsonl(first, [{"prompt": p, "answer": a} for p, a in ("x1", "y2", "x1", "x3")])
    as_jsonl(second, [{"prompt": p, "answer": a} for p, a in ("y2", "z4")])
    seen: dict[str, str] = {}
    files = [read_prompt_file(path, seen=seen) for path in (first, second)]
    assert [[record.prompt for record in file.records] for file in files] == [["x", "y"], ["z"]]
    assert [record.index for record in files[0].records] == [0, 1]
    told = [file.description.partition("; ")[2] for file in files]
    assert told == [
        "left out: 2 that repeat a prompt, 1 of them with another answer",
        "left out: 1 that repeat a prompt",
    ]
    assert len(read_prompts(first)) == 4


def test_prompts_can_be_left_out_by_index(tmp_path):
    path = tmp_path / "a.jsonl"
    as_jsonl(path, [{"prompt": p, "answer": "1"} for p in "abcd"])
    file = without(read_prompt_file(path), {1, 2}, "longer than 9")
    assert [(record.prompt, record.index) for record in file.records] == [("a", 0), ("d", 1)]
    assert file.description.endswith("; left out: 2 longer than 9")
    assert without(file, set(), "longer than 9") is file


def prompt_file(name, size, weight=None):
    records = [PromptRecord(f"{name}{i}", "1", "math", i, f"{name}:{i}") for i in range(size)]
    return PromptFile(name, records, name, weight=weight)


def test_files_take_turns_by_weight():
    files = [prompt_file("a", 30, 3.0), prompt_file("b", 50, 1.0)]
    stream = PromptStream(files, seed=1)
    steps = [stream.prompts_for_step(step, 8) for step in range(40)]
    for records in steps:
        assert Counter(record.prompt[0] for record in records) == {"a": 6, "b": 2}
        assert len({record.prompt for record in records}) == 8
    of_a = [record.prompt for records in steps for record in records if record.prompt[0] == "a"]
    assert all(len(set(of_a[i : i + 30])) == 30 for i in range(0, 240, 30))
    resumed = PromptStream(files, seed=1)
    assert resumed.prompts_for_step(39, 8) == steps[39]
    with pytest.raises(ValueError, match="one step takes 50 of the file's 30, and would have"):
        stream.prompts_for_step(0, 64)


def test_files_without_weights_count_by_size():
    stream = PromptStream([prompt_file("a", 30), prompt_file("b", 10)], seed=1)
    epoch = [record for step in range(5) for record in stream.prompts_for_step(step, 8)]
    assert len({record.prompt for record in epoch}) == 40 == stream.size
    assert [record.index for record in stream.records(0)] == list(range(40))


def test_the_fingerprint_of_several_files_knows_all_of_them_and_their_weights():
    prints = {
        PromptStream(files).fingerprint()
        for files in (
            [prompt_file("a", 9)],
            [prompt_file("a", 9), prompt_file("b", 9)],
            [prompt_file("a", 9, 1.0), prompt_file("b", 9, 2.0)],
            [prompt_file("a", 9, 1.0), prompt_file("b", 9, 3.0)],
        )
    }
    assert len(prints) == 4
