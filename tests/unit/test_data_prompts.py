"""Reading prompts and texts from files, and the prompts of each step."""

from __future__ import annotations

import json
import re

import pytest

from megatron_occ.data import (
    PromptOptions,
    PromptRecord,
    PromptStream,
    build_task,
    extract_final_answer,
    read_jsonl_texts,
    read_prompts,
)


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def seven(tmp_path):
    lines = [json.dumps({"prompt": f"p{i}", "answer": str(i)}) for i in range(7)]
    return write(tmp_path / "seven.jsonl", *lines)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 2 + 2 = <<2+2=4>>4.\n#### 4", "4"),
        ("#### 1\n#### 70,000 ", "70,000"),
        (" \\frac12 ", "\\frac12"),
        ("####", ""),
    ],
)
def test_extract_final_answer(text, answer):
    assert extract_final_answer(text) == answer


def test_read_prompts_takes_both_spellings_and_skips_blank_lines(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        json.dumps({"question": "1+1? é", "answer": "so\n#### 2", "source": "x"}),
        "  ",
        json.dumps({"prompt": "2+2?", "question": "ignored", "answer": "4", "task_name": "exact"}),
    )
    assert read_prompts(path) == [
        PromptRecord("1+1? é", "2", "math", 0, f"{path}:1"),
        PromptRecord("2+2?", "4", "exact", 1, f"{path}:3"),
    ]
    assert read_prompts(path, PromptOptions(verifier="exact"))[0].task_name == "exact"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"bad\.jsonl:2: not JSON"),
        ("[1, 2]", r"bad\.jsonl:2: expected a JSON object, got list"),
        ('{"answer": "1"}', r"bad\.jsonl:2: no field for the prompt among prompt, .* has answer\."),
        ('{"prompt": "p"}', r"bad\.jsonl:2: no field for the answer .* data\.fields\.answer=NAME"),
        ('{"prompt": "p", "answer": true}', r"bad\.jsonl:2: 'answer' must be text, got bool True"),
        ('{"prompt": "p", "answer": {}}', r"bad\.jsonl:2: 'answer' must be text, got dict"),
        ('{"prompt": "p", "answer": []}', r"bad\.jsonl:2: 'answer' is an empty list"),
        ('{"prompt": "p", "answer": NaN}', r"bad\.jsonl:2: 'answer' must be a finite number"),
        ('{"prompt": "p", "solution": "so 4"}', r"bad\.jsonl:2: 'solution' has neither '####' nor"),
        ('{"prompt": ["p"], "answer": "1"}', r"bad\.jsonl:2: 'prompt'\[0\] must be a message"),
        ('{"question": " ", "answer": "1"}', r"bad\.jsonl:2: 'question' is empty"),
        ('{"prompt": "p", "answer": "so ####"}', r"bad\.jsonl:2: 'answer' has nothing after"),
        ('{"prompt": "p", "answer": "1", "task_name": null}', r"bad\.jsonl:2: 'task_name' must"),
        ("[" * 100_000, r"bad\.jsonl:2: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '{"prompt": "p", "answer": "1"}', line)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        read_prompts(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "p", "answer": "1"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


def test_a_folder_is_no_file_of_prompts(tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: is a folder"):
        read_prompts(tmp_path)


def test_prompts_know_their_place(tmp_path):
    lines = ['{"prompt": "p", "answer": "1"}', "", '{"prompt": "q", "answer": "1"}']
    path = write(tmp_path / "p.jsonl", *lines, '{"prompt": "r", "answer": "1", "task_name": "m"}')
    stream = PromptStream(path, options=PromptOptions(verifier="exact"))
    assert [stream.place(record) for record in stream.records(1)] == [
        f"{path}:{line}" for line in (1, 3, 4)
    ]
    assert stream.task_names() == {"exact": f"{path}:1", "m": f"{path}:4"}
    task = PromptStream(build_task("reversed_addition"), seed=0)
    assert [task.place(record) for record in task.records(2)] == [
        f"reversed_addition, train problem {index}" for index in (0, 1)
    ]


def test_read_jsonl_texts(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a"}', "", '{"text": "b\\n"}', '{"body": "c"}')
    texts = read_jsonl_texts(path)
    assert [next(texts), next(texts)] == ["a", "b\n"]
    with pytest.raises(ValueError, match=r"t\.jsonl:4: missing key 'text'; the line has body"):
        next(texts)
    with pytest.raises(ValueError, match=r"t\.jsonl:1: missing key 'body'"):
        list(read_jsonl_texts(path, key="body"))


def test_each_epoch_of_a_file_is_another_permutation(seven):
    stream = PromptStream(seven, seed=1)
    drawn = [record.index for step in range(21) for record in stream.prompts_for_step(step, 3)]
    epochs = [drawn[7 * e : 7 * e + 7] for e in range(9)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert stream.size == 7


def test_steps_do_not_depend_on_the_steps_before(seven):
    stream = PromptStream(seven, seed=1)
    forward = [stream.prompts_for_step(step, 5) for step in range(12)]
    resumed = PromptStream(seven, seed=1)
    assert [resumed.prompts_for_step(step, 5) for step in reversed(range(12))] == forward[::-1]
    other = PromptStream(seven, seed=2)
    assert [other.prompts_for_step(step, 5) for step in range(12)] != forward


def test_no_step_has_a_prompt_twice(seven):
    for n in (2, 3, 5, 6, 7):
        stream = PromptStream(seven, seed=3)
        for step in range(40):
            drawn = [record.index for record in stream.prompts_for_step(step, n)]
            assert len(set(drawn)) == n
    with pytest.raises(ValueError, match="one step takes 8 of the file's 7, and would have"):
        PromptStream(seven).prompts_for_step(0, 8)


def test_validation_is_the_file_in_order_once(seven):
    stream = PromptStream(seven, seed=3, split="validation")
    assert [r.prompt for r in stream.prompts_for_step(1, 3)] == ["p3", "p4", "p5"]
    with pytest.raises(ValueError, match="validation has 7 prompts, number 9 was asked for"):
        stream.prompts_for_step(2, 3)


def test_generated_prompts_are_the_problems_in_order():
    task = build_task("reversed_addition", digits=2, seed=0)
    stream = PromptStream(task)
    records = stream.prompts_for_step(3, 4)
    assert [record.index for record in records] == [12, 13, 14, 15]
    for record in records:
        problem = task.problem("train", record.index)
        assert (record.prompt, record.answer) == (problem.prompt, problem.answer)
        assert record.task_name == "reversed_addition"
    assert stream.size is None


def test_seed_moves_generated_train_and_not_validation():
    task = build_task("reversed_multiplication")
    for split, equal in (("train", False), ("validation", True)):
        first = PromptStream(task, seed=0, split=split).prompts_for_step(0, 8)
        second = PromptStream(task, seed=1, split=split).prompts_for_step(0, 8)
        assert (first == second) == equal


def test_fingerprint_notices_a_changed_source(seven):
    before = PromptStream(seven).fingerprint()
    assert before == PromptStream(seven, seed=5).fingerprint()
    seven.write_text(seven.read_text().replace('"p6"', '"p8"'))
    assert PromptStream(seven).fingerprint() != before

    small, large = build_task("reversed_addition", digits=2), build_task("reversed_addition")
    assert PromptStream(small).fingerprint() != PromptStream(large).fingerprint()
    assert PromptStream(large).fingerprint() == PromptStream(large).fingerprint()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"split": "test"}, "'test'"), ({"seed": -1}, "got -1")]
)
def test_bad_stream_arguments_are_refused(seven, arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptStream(seven, **arguments)
    with pytest.raises(ValueError, match="step=-1"):
        PromptStream(seven).prompts_for_step(-1, 4)
