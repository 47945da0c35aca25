"""Prompts of a run are read and measured at its start: what is refused, and how it is told."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from megatron_occ.data import build_task
from megatron_occ.data.from_config import read_task, read_tokenizer
from megatron_occ.data.prompt_checks import check_prompts
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.data.tokenizers import CharTokenizer
from megatron_occ.phases.fingerprints import check_same_files, keep_fingerprints
from megatron_occ.phases.inputs import check_lengths, prompt_room, read_inputs
from megatron_occ.phases.prompt_files import check_first_records
from tests.unit.fakes import ALPHABET, TOKENIZER
from tests.unit.rl_setup import file_config, rl_config


def write(path, *prompts):
    """One prompt a line; "" is a blank line, which is skipped and counts."""
    lines = [json.dumps({"prompt": p, "answer": "a"}) if p else "" for p in prompts]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(config, tokenizer=TOKENIZER, **command):
    inputs = read_inputs(config, None, tokenizer, **{"trains": True, "validates": True} | command)
    check_lengths(config, inputs, tokenizer)
    return inputs


def test_every_line_of_both_files_is_measured_before_a_run(tmp_path):
    train = write(tmp_path / "train.jsonl", "abcd", "", "abcde", "axc")
    held_out = write(tmp_path / "held_out.jsonl", *["ab"] * 20, "abcdabcd")
    config = file_config(train, held_out)
    assert (prompt_room(config), config.rl.validation.problems) == (4, 4)
    with pytest.raises(ValueError, match=r"^3 prompts can't be used:\n") as refused:
        read(config)
    _, *lines, remedy = str(refused.value).splitlines()
    assert lines == [
        f"  - {train}:3: the prompt has 5 tokens, allowed are 1 to 4",
        f"  - {train}:4: character 'x' at position 1 of 'axc' is not in the alphabet {ALPHABET!r}",
        f"  - {held_out}:21: the prompt has 8 tokens, allowed are 1 to 4",
    ]
    for part in ("rl.rollout.max_response_length=6", "model.max_position_embeddings=10"):
        assert part in remedy
    assert "tokenizer.alphabet" in remedy


def test_prompts_that_just_fit_are_taken(tmp_path):
    path = write(tmp_path / "p.jsonl", "abcd", "a")
    assert read(file_config(path, path)).train.size == 2


def test_a_measured_checkpoint_reads_the_validation_prompts_alone(tmp_path):
    train, held_out = write(tmp_path / "t.jsonl", "abcdef"), write(tmp_path / "v.jsonl", "ab")
    assert read(file_config(train, held_out), trains=False).train is None
    with pytest.raises(ValueError, match=f"^1 prompt can't .*\n.*{re.escape(str(train))}:1: "):
        read(file_config(held_out, train), trains=False)


def test_all_wrong_prompts_are_counted_and_the_first_are_shown():
    """Wrong is every third of 3000: several calls of the tokenizer."""
    prompts = [
        (f"f:{n}", PromptRecord("abc" if n % 3 else "abcde", "a", "exact", n)) for n in range(3000)
    ]
    with pytest.raises(ValueError, match=r"^1,000 prompts can't be used:\n") as refused:
        check_prompts(prompts, TOKENIZER, 4, "Shorten them")
    _, *lines, rest, remedy = str(refused.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"  - f:{n}" for n in (0, 3, 6, 9, 12)]
    assert (rest, remedy) == ("  - and 995 more", "Shorten them")


def test_a_prompt_of_no_tokens_is_refused():
    class Deaf(CharTokenizer):
        def encode(self, text):
            return []

    with pytest.raises(ValueError, match="f:1: the prompt has 0 tokens"):
        check_prompts([("f:1", PromptRecord("a", "a", "exact", 0, 1))], Deaf("a"), 4, "")


def test_problems_of_a_task_are_measured_too():
    task = build_task("reversed_addition", digits=2)
    tokenizer = CharTokenizer(task.alphabet)
    config = rl_config("data.task={name: reversed_addition, params: {digits: 2}}")
    for room, message in ((6, ""), (5, "problem 0: the prompt has 6 tokens, allowed are 1 to 5")):
        config.model.max_position_embeddings = room + config.rl.rollout.max_response_length
        inputs = read_inputs(config, task, tokenizer, trains=True, validates=True)
        if not message:
            check_lengths(config, inputs, tokenizer)
            continue
        with pytest.raises(ValueError, match=f"^8 prompts.*\n.*reversed_addition, train {message}"):
            check_lengths(config, inputs, tokenizer)


@pytest.mark.parametrize(
    ("train", "held_out", "warning"),
    [
        (["a", "b", "c"], ["d", "e"], None),
        (["a", "b", "c"], ["b", "d", "a"], "2 of the 3 validation prompts are also training"),
        # four are measured, whatever else is in the file
        (["f"], ["a", "b", "c", "d", "f"], None),
        (["a", "a"], ["a", "a"], "2 of the 2 validation prompts"),
    ],
)
def test_validation_prompts_that_are_trained_on_are_a_warning(tmp_path, train, held_out, warning):
    files = write(tmp_path / "t.jsonl", *train), write(tmp_path / "v.jsonl", *held_out)
    warnings = read(file_config(*files)).warnings
    assert len(warnings) == (warning is not None)
    if warning:
        assert warning in warnings[0]
        assert f"data.prompts={files[0]}" in warnings[0]


@pytest.mark.parametrize("key", ["prompts", "validation_prompts"])
def test_what_is_no_file_is_refused_with_its_key(tmp_path, key):
    good, gone = write(tmp_path / "p.jsonl", "a"), tmp_path / "gone.jsonl"
    for path, reason in ((tmp_path, "is a folder"), (gone, "no such file")):
        files = {"prompts": good, "validation_prompts": good, key: path}
        with pytest.raises(ValueError, match=f"^data.{key}: {re.escape(str(path))}: {reason}"):
            read(file_config(*files.values()))


def test_a_folder_without_a_tokenizer_is_told_in_one_line(tmp_path):
    pytest.importorskip("transformers")
    config = rl_config("tokenizer.kind=hf", f"tokenizer.path={tmp_path}")
    with pytest.raises(
        ValueError, match=r"^tokenizer\.path: no tokenizer could be read"
    ) as refused:
        read_tokenizer(config, None)
    message = str(refused.value)
    assert "\n" not in message
    assert f"{str(tmp_path)!r}: it holds no tokenizer.json" in message


def test_an_alphabet_without_the_end_of_a_response_is_refused():
    config = rl_config("data.task.name=reversed_addition", "tokenizer.alphabet='0123456789+='")
    with pytest.raises(ValueError, match=r"^tokenizer\.alphabet: character '\.' at position 0"):
        read_tokenizer(config, read_task(config))


def test_a_step_of_more_prompts_than_there_are_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", "a", "b", "a")
    with pytest.raises(
        ValueError, match=r"^rl\.prompts_per_step=3: one step takes 3 of the file's 2"
    ):
        read(file_config(path, path, "rl.prompts_per_step=3"))


def test_what_was_read_is_told(tmp_path):
    train = write(tmp_path / "t.jsonl", "a", "b", "a", "abcd")
    held_out = write(tmp_path / "v.jsonl", "c", "c")
    config = file_config(train, held_out, "data.max_prompt_tokens=3")
    assert read(config).notes == [
        f"data.prompts: 2 prompts from {train} (prompt, answer); left out: 1 that repeat a prompt; "
        "1 longer than data.max_prompt_tokens=3",
        f"data.validation_prompts: 2 prompts from {held_out} (prompt, answer)",
    ]
    with pytest.raises(ValueError, match=r"^data\.prompts: 0 prompts .*nothing is left"):
        read(file_config(held_out, held_out, "data.max_prompt_tokens=1", "data.chat.suffix=abcd"))


def test_several_files_by_weight(tmp_path):
    first = write(tmp_path / "a.jsonl", "a", "b", "c")
    second = write(tmp_path / "b.jsonl", "aa", "bb", "cc")
    files = f"{{{first}: 2, {second}: 1}}"
    config = file_config("", first, f"data.prompts={files}", "rl.prompts_per_step=3")
    drawn = [record.prompt for record in read(config).train.prompts_for_step(0, 3)]
    assert sorted(map(len, drawn)) == [1, 1, 2]


def test_a_verifier_that_no_prompt_asks_for_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "answer": "a", "task_name": "arithmetic"}\n')
    with pytest.raises(
        ValueError, match=r"^data\.verifier=exact: no prompt asks for it: .* arithmetic"
    ):
        read(file_config(path, path))
    given = "data.verifiers={mine: 'json:dumps'}"
    with pytest.raises(ValueError, match=r"^data\.verifiers\.mine: no prompt asks for it"):
        read(file_config(path, path, "data.verifier=math", given))


def test_a_dry_run_reads_the_first_records(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = ['{"prompt": "a", "answer": "a"}'] * 99 + ['{"prompt": "a"}']
    path.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match=r"^data\.prompts: .*t\.jsonl:100: no field for the answer"
    ):
        check_first_records(file_config(path, path))
    path.write_text("\n".join(lines[:99]))
    check_first_records(file_config(path, path))
    check_first_records(file_config(tmp_path / "gone", path))
    given = "data.verifiers={not_there: 'no_such_module:f'}"
    with pytest.raises(ValueError, match="no_such_module"):
        check_first_records(file_config(path, path, given))


def test_a_file_that_changes_between_resumed_runs_is_refused(tmp_path):
    train = write(tmp_path / "t.jsonl", "a", "b")
    held_out = write(tmp_path / "v.jsonl", "c")
    config = file_config(train, held_out)
    run = SimpleNamespace(folder=tmp_path, resume=False, layout=SimpleNamespace(is_main=True))
    keep_fingerprints(run, read(config))
    check_same_files(run, read(config))
    run.resume = True
    check_same_files(run, read(config))
    write(held_out, "d")
    with pytest.raises(
        ValueError, match=r"^data\.validation_prompts: .*v\.jsonl has changed since"
    ):
        check_same_files(run, read(config))
    write(held_out, "c")
    write(train, "a", "b", "c")
    with pytest.raises(ValueError, match=r"^data\.prompts: .*t\.jsonl has changed since"):
        check_same_files(run, read(config))


def set_config(tmp_path, *overrides):
    """Three prompts in one set, one that is longer in the other."""
    write(tmp_path / "one.jsonl", "a", "b", "c")
    write(tmp_path / "two.jsonl", "abcd")
    train = write(tmp_path / "train.jsonl", "ab", "c")
    sets = f"{{one: {tmp_path / 'one.jsonl'}, two: {tmp_path / 'two.jsonl'}}}"
    return file_config(train, sets, *overrides)


def test_several_sets_are_read_by_name(tmp_path):
    inputs = read(set_config(tmp_path))
    assert {name: stream.size for name, stream in inputs.held_out.items()} == {"one": 3, "two": 1}
    assert [note.split(":")[0] for note in inputs.notes] == [
        *("data.prompts", "data.validation_prompts.one", "data.validation_prompts.two")
    ]
    (warning,) = inputs.warnings
    assert warning.startswith("1 of the 3 validation prompts of one are also training prompts")


def test_an_evaluation_needs_room_for_its_own_responses(tmp_path):
    config = set_config(tmp_path, "eval.max_response_length=7")
    alone = {"trains": False, "validates": False, "evaluates": True}
    for command in (alone, {"evaluates": True}):
        with pytest.raises(ValueError, match=r"two\.jsonl:1: .* allowed are 1 to 3") as refused:
            read(config, **command)
        assert "lower eval.max_response_length=7" in str(refused.value)
    # of RL's validation there is room for the longer ones of RL
    assert read(config).held_out["two"].size == 1
    longer = set_config(tmp_path, "eval.max_response_length=3", "rl.rollout.max_response_length=8")
    assert read(longer, **alone).evaluates


def test_an_evaluation_of_more_problems_than_a_task_has_is_refused():
    config = rl_config("data.task={name: reversed_addition, params: {digits: 1, terms: 2}}")
    config.eval.problems = 1000
    task = read_task(config)
    with pytest.raises(ValueError, match=r"^eval\.problems=1000: validation problem"):
        read_inputs(config, task, read_tokenizer(config, task), evaluates=True)


def test_a_resumed_run_goes_on_with_the_same_sets(tmp_path):
    config = set_config(tmp_path)
    layout = SimpleNamespace(is_main=True)
    run = SimpleNamespace(folder=tmp_path, resume=True, layout=layout)
    keep_fingerprints(run, read(config))
    check_same_files(run, read(config))
    write(tmp_path / "two.jsonl", "dcba")
    with pytest.raises(ValueError, match=r"^data\.validation_prompts: .*two\.jsonl has changed"):
        check_same_files(run, read(config))
