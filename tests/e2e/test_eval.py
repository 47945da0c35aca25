"""Evaluation through the commands: sets and checkpoints, after RL, on ranks, and from one yaml."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_occ.cli import main
from tests.e2e.conftest import metrics, read_lines, torchrun

SUMS = ("1+2+3", "4+0+5", "2+2+2")
ALPHABET = "0123456789+*=."
FROM_FILES = ("data.task={name: null, params: {}}", f"tokenizer.alphabet={ALPHABET}")
SMALL = (
    *("rl.prompts_per_step=2", "rl.mini_batches=1", "rl.samples_per_prompt=2", "rl.steps=1"),
    "rl.micro_batch_size=2",
    "mtp.preset=detach",
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def sets(tmp_path):
    """Overrides: training prompts, three sums of a task's verifier, and one of ``math``."""
    sums = [
        {"prompt": f"{each}=", "answer": str(eval_sum(each)), "task_name": "arithmetic"}
        for each in SUMS
    ]
    train = write(tmp_path / "train.jsonl", sums[:2])
    first = write(tmp_path / "sums.jsonl", sums)
    second = write(tmp_path / "boxed.jsonl", [{"prompt": "1+1+1=", "answer": "3"}])
    given = f"data.validation_prompts={{sums: {first}, boxed: {second}}}"
    return (*FROM_FILES, f"data.prompts={train}", given)


def eval_sum(text):
    return sum(map(int, text.split("+")))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_sets_and_checkpoints_in_one_start(run, pretrained, sets, tmp_path, capsys):
    start, own = str(pretrained(1)), ("eval.samples=3", "eval.max_response_length=8")
    after = (*sets, *own, *SMALL, "eval.after_rl=true")
    trained = run("rl", "run", f"rl.init_from={start}", *after)
    (line, _) = metrics(trained, "validation")
    assert line["problems"] == line["sums/problems"] + line["boxed/problems"] == 4
    assert line["pass@1"] == pytest.approx((line["sums/pass@1"] + line["boxed/pass@1"]) / 2)

    capsys.readouterr()
    last, out = trained / "checkpoints" / "rl" / "step_000001", tmp_path / "out"
    both = ("--checkpoint", start, "--checkpoint", str(last), "--out", str(out))
    run("eval", "run", *sets, *own, *both)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[2].split() == ["sums", "boxed", "average"]
    assert lines[3].startswith("avg@3") and lines[-3].endswith(str(out / "evaluation.html"))
    assert "maj@3 is left out: verifier 'arithmetic' reads no answers" in text

    found = results(out)
    assert [row["name"] for row in found["rows"]] == ["depths_1 pretrain 120", "run rl 1"]
    assert found["settings"]["max_response_length"] == 8
    assert [each["problems"] for each in found["sets"]] == [3, 1]
    for row in found["rows"]:
        average, of = row["average"], row["sets"]
        for name in ("avg@3", "pass@2", "length"):
            values = [of[each][name]["value"] for each in ("sums", "boxed")]
            assert average[name]["value"] == pytest.approx(sum(values) / 2)
        assert of["boxed"]["maj@3"]["value"] == 0 and "maj@3" not in average
        assert of["boxed"]["avg@3"]["error"] is None
    responses = read_lines(out / "responses.jsonl")
    assert len(responses) == 2 * (3 + 1) * 3
    assert max(each["tokens"] for each in responses) <= 8
    # the policy that RL ended with is the checkpoint that it wrote
    after_rl = trained / "eval" / "rl_step_000001"
    assert results(after_rl)["rows"][0]["sets"] == found["rows"][1]["sets"]
    texts = [each["response"] for each in read_lines(after_rl / "responses.jsonl")]
    assert texts == [each["response"] for each in responses[len(responses) // 2 :]]


def test_two_ranks_write_what_one_writes(run, pretrained, sets):
    given = (f"rl.init_from={pretrained(1)}", *sets, *SMALL, "eval={after_rl: true, samples: 2}")
    alone = run("rl", "alone", *given)
    done = torchrun(run.folder / "ranks", 2, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (folder / "eval" / "rl_step_000001" for folder in (alone, run.folder / "ranks"))
    for mine, theirs in zip(
        *(read_lines(each / "responses.jsonl") for each in (one, two)), strict=True
    ):
        assert {**mine, "checkpoint": ""} == {**theirs, "checkpoint": ""}
    assert results(one)["rows"][0]["sets"] == results(two)["rows"][0]["sets"]


def test_a_checkpoint_given_twice_is_refused(run, pretrained):
    start = str(pretrained(1))
    with pytest.raises(SystemExit, match="is given twice"):
        run("eval", "run", "--checkpoint", start, "--checkpoint", start)
    assert not (run.folder / "run").exists()


SHAPES = {
    "aime24": {"problem": "1+2+3", "answer": "6", "solution": "so 6"},
    "aime25": {"problem": "1+2+3", "answer": 6},
    "amc23": {"question": "1+2+3", "answer": 6.0},
    "math500": {"problem": "1+2+3", "answer": "6", "level": 3},
    "minerva": {"problem": "1+2+3", "solution": "It is \\boxed{6}."},
    "olympiad": {"question": "1+2+3", "final_answer": ["6"]},
}


def test_one_yaml_trains_a_folder_with_its_chat_template_and_evaluates_on_six_sets(
    run, pretrained, tmp_path
):
    folder = tmp_path / "model"
    main(["convert", "export", str(pretrained(1)), str(folder)])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template})
    )
    dapo = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": each}],
            "reward_model": {"ground_truth": str(eval_sum(each)), "style": "rule"},
        }
        for each in SUMS
    ]
    parquet = tmp_path / "dapo-math-17k.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(dapo), parquet)
    files = {name: write(tmp_path / f"{name}.jsonl", [each]) for name, each in SHAPES.items()}
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model: {{from_hf: {folder}}}\n"
        "data:\n"
        "  task: {name: null}\n"
        f"  prompts: {parquet}\n"
        "  chat: {apply: always}\n"
        f"  validation_prompts: {json.dumps({n: str(path) for n, path in files.items()})}\n"
        "rl: {steps: 1, prompts_per_step: 2, samples_per_prompt: 2, mini_batches: 1,\n"
        "  micro_batch_size: 4, rollout: {max_response_length: 9, batch_size: 32}}\n"
        "eval: {after_rl: true, samples: 2, temperature: 0.6}\n"
    )
    trained = run("rl", "run", "mtp.preset=detach", config=config)
    found = results(trained / "eval" / "rl_step_000001")
    assert [each["name"] for each in found["sets"]] == list(SHAPES)
    lines = read_lines(trained / "eval" / "rl_step_000001" / "responses.jsonl")
    assert {line["prompt"] for line in lines} == {"1+2+3="}
    assert {line["answer"] for line in lines} == {"6"}
    # the text that the model was pretrained on comes back
    assert any("=" in line["response"] for line in lines)
    assert metrics(trained, "validation")[-1].keys() >= {f"{name}/avg@1" for name in SHAPES}
