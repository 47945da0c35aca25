"""Bad inputs are refused before a folder is written; phases and Ctrl-C end cleanly."""

from __future__ import annotations

import gc
import json
import re
import weakref

import pytest

from megatron_occ.cli import main
from megatron_occ.data import build_tokenizer
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.corpus import write_corpus
from megatron_occ.phases import sampling, start
from megatron_occ.rl.evaluation import held_out_problems
from megatron_occ.rl.pretraining import PretrainTrainer
from tests.e2e.conftest import metrics

ALPHABET = "0123456789+*=."
FROM_FILES = (
    *("data.task.name=null", "data.task.params={}", f"tokenizer.alphabet={ALPHABET}"),
    # files of one prompt: no step has one twice
    *("rl.prompts_per_step=1", "rl.samples_per_prompt=8"),
)
MEASURED = ("pretrain.steps=6", "pretrain.validate_every=3", "pretrain.stop_at_pass_rate=1.0")


def prompts(path, *answers, **extra):
    lines = [{"prompt": "1+2+3=", "answer": answer, **extra} for answer in answers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("checkpoint", ["other depths", "none"])
def test_a_start_that_does_not_fit_leaves_the_folder_free(run, pretrained, tmp_path, checkpoint):
    start, message = pretrained(2), "mtp_layers is 2, this run has 1"
    if checkpoint == "none":
        start, message = tmp_path / "none", "not a complete checkpoint"
    with pytest.raises(SystemExit, match=message):
        run("rl", "run", f"rl.init_from={start}", "rl.steps=1")
    assert not (run.folder / "run").exists()
    run("rl", "run", f"rl.init_from={pretrained(1)}", "rl.steps=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pretrain.sequence_length=8",), "sequence length 8"),
        (
            (*MEASURED, "rl.validation.problems=100000"),
            r"rl\.validation\.problems=100000: pretrain",
        ),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "rl"])
def test_generated_data_that_does_not_fit_leaves_the_folder_free(run, command, overrides, message):
    with pytest.raises(SystemExit, match=message):
        run(command, "run", *overrides)
    assert not (run.folder / "run").exists()


@pytest.mark.parametrize("command", ["rl", "eval"])
def test_prompts_that_do_not_fit_leave_the_folder_free(run, pretrained, tmp_path, command):
    """Room is for 16 - 10 tokens."""
    good = prompts(tmp_path / "train.jsonl", "6")
    long = prompts(tmp_path / "held_out.jsonl", *"6" * 9)
    long.write_text(long.read_text() + '\n{"prompt": "1+2+3+4=", "answer": "10"}\n')
    files = (f"data.prompts={good}", f"data.validation_prompts={long}")
    start = str(pretrained(1))
    given = ("--checkpoint", start) if command == "eval" else (f"rl.init_from={start}",)
    with pytest.raises(SystemExit, match=r"held_out\.jsonl:11: the prompt has 8 tokens"):
        run(command, "run", *FROM_FILES, *files, "rl.rollout.max_response_length=10", *given)
    assert not (run.folder / "run").exists()


def test_training_on_validation_prompts_is_an_event(run, pretrained, tmp_path):
    same = prompts(tmp_path / "same.jsonl", "6")
    files = (f"data.prompts={same}", f"data.validation_prompts={same}")
    arguments = (*FROM_FILES, *files, f"rl.init_from={pretrained(1)}")
    folder = run("rl", "run", *arguments, "rl.steps=1", "rl.save_every=1")
    (event, _) = metrics(folder, "event")
    assert event["step"] == 0
    assert event["message"].startswith("1 of the 1 validation prompts are also training prompts")
    run("rl", "run", *arguments, "rl.steps=2", "--resume")
    events = [line["message"] for line in metrics(folder, "event")]
    assert sum("also training prompts" in message for message in events) == 1


@pytest.mark.parametrize(
    ("extra", "answers", "message"),
    [({}, ("6", ""), r"held_out\.jsonl:2"), ({"task_name": "nosuch"}, ("6",), "nosuch")],
)
def test_bad_prompts_leave_the_folder_free(run, pretrained, tmp_path, extra, answers, message):
    train = prompts(tmp_path / "train.jsonl", "6")
    held_out = prompts(tmp_path / "held_out.jsonl", *answers, **extra)
    files = (f"data.prompts={train}", f"data.validation_prompts={held_out}")
    with pytest.raises(SystemExit, match=message):
        run("rl", "run", *FROM_FILES, *files, f"rl.init_from={pretrained(1)}")
    assert not (run.folder / "run").exists()


def test_a_missing_corpus_leaves_the_folder_free(run, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        run("pretrain", "run", *FROM_FILES, f"data.corpus={tmp_path / 'nowhere'}")
    assert not (run.folder / "run").exists()


def test_pretraining_is_not_measured_on_bad_prompts(run, tmp_path):
    held_out = prompts(tmp_path / "held_out.jsonl", "")
    text, tokenizer = (
        prompts(tmp_path / "text.jsonl", *"6" * 50),
        build_tokenizer("char", alphabet=ALPHABET),
    )
    write_corpus([text], tmp_path / "corpus", tokenizer, key="prompt")
    files = (f"data.corpus={tmp_path / 'corpus'}", f"data.prompts={held_out}")
    files += (f"data.validation_prompts={held_out}",)
    with pytest.raises(SystemExit, match=r"held_out\.jsonl:1"):
        run("pretrain", "run", *FROM_FILES, *files, *MEASURED)
    assert not (run.folder / "run").exists()


def test_pretraining_reads_the_prompts_it_is_measured_on_first_and_once(run, monkeypatch):
    splits, original, build = [], PromptStream.__init__, MegatronGPTActor.__init__

    def make(self, source, seed=0, split="train", **options):
        splits.append(split)
        original(self, source, seed, split, **options)

    def built(self, *args, **kwargs):
        splits.append("model")
        build(self, *args, **kwargs)

    monkeypatch.setattr(PromptStream, "__init__", make)
    monkeypatch.setattr(MegatronGPTActor, "__init__", built)
    folder = run("pretrain", "run", *MEASURED)
    assert [line["step"] for line in metrics(folder, "pretrain")] == [3, 6]
    # "train" is the fingerprint of the generated corpus
    assert splits == ["train", "validation", "model"]


def test_pretraining_and_rl_are_measured_on_different_problems(run, monkeypatch):
    seen, original = [], sampling.evaluate

    def evaluate(sampler, sets, config, seed, *, part, **options):
        (stream,) = sets.values()
        seen.append({r.index for r in held_out_problems(stream, config.problems, part)})
        return original(sampler, sets, config, seed, part=part, **options)

    monkeypatch.setattr(sampling, "evaluate", evaluate)
    run("rl", "run", *MEASURED, "rl.steps=1")
    assert seen == [set(range(8, 16))] * 2 + [set(range(8))] * 2


def test_the_pretraining_model_is_gone_when_rl_builds_its_own(run, monkeypatch):
    alive, build = [], MegatronGPTActor.__init__

    def watched(self, *args, **kwargs):
        alive.append([ref() is not None for ref in refs])
        build(self, *args, **kwargs)
        refs.extend(weakref.ref(part) for part in (self, self.chunks[0], self.optimizer))

    refs = []
    monkeypatch.setattr(MegatronGPTActor, "__init__", watched)
    gc.disable()
    try:
        run("rl", "run", *MEASURED, "rl.steps=1")
    finally:
        gc.enable()
    assert alive == [[], [False] * 3]


@pytest.mark.parametrize(
    ("saves", "told"),
    [
        (2, r"--resume goes on from .*/run/checkpoints/pretrain/step_000002\n"),
        (6, "no checkpoint yet: the same command with --resume begins anew"),
    ],
)
def test_ctrl_c_exits_with_130_and_tells_how_to_go_on(run, monkeypatch, capsys, saves, told):
    own = PretrainTrainer.run_step

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return own(self)

    monkeypatch.setattr(PretrainTrainer, "run_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run("pretrain", "run", "pretrain.steps=6", f"pretrain.save_every={saves}")
    assert stopped.value.code == 130
    assert re.search(f"megatron-occ: interrupted: .*{told}", capsys.readouterr().err)


def test_ctrl_c_before_a_run_folder_is_made_says_so(run, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(start, "checked_inputs", interrupted)
    with pytest.raises(SystemExit):
        run("pretrain", "run", "pretrain.steps=6")
    assert "megatron-occ: interrupted: nothing was written yet" in capsys.readouterr().err


def test_a_run_folder_that_is_a_file_is_refused(run):
    run.folder.mkdir(exist_ok=True)
    (run.folder / "file").write_text("")
    with pytest.raises(SystemExit, match=r"run_dir=.*/file is a file: name a folder"):
        run("pretrain", "file")
    with pytest.raises(SystemExit, match=r"run_dir=.*/file/run: can't be made: .*Not a directory"):
        run("pretrain", "file/run")


def test_ctrl_c_in_a_report_does_not_speak_of_resuming(tmp_path, monkeypatch, capsys):
    def interrupted(_folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_occ.observe.write_report", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 130
    assert "--resume" not in capsys.readouterr().err
