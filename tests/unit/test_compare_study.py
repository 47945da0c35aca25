"""Study files: what they say, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.compare.runs import check_runs, start_checkpoint, start_run, study_runs
from megatron_occ.compare.study import read_study
from megatron_occ.config import ConfigError, save_config
from megatron_occ.config.presets import PRESETS

CONF = Path(__file__).parents[2] / "conf"
TEXT = f"""
base: {CONF / "rl" / "tiny.yaml"}
folder: FOLDER
overrides: [rl.steps=4]
seeds: [3, 5]
arms:
  detach: [mtp.preset=detach]
  none: [mtp.preset=none]
  fast: [mtp.preset=detach, rl.optimizer.lr=1e-2]
"""


def write(folder, text=TEXT):
    path = folder / "study.yaml"
    path.write_text(text.replace("FOLDER", str(folder / "out")))
    return path


def refused(folder, old, new, *overrides):
    assert old in TEXT
    with pytest.raises(ConfigError) as caught:
        read_study(write(folder, TEXT.replace(old, new)), overrides)
    return str(caught.value)


def test_a_study_says_what_its_runs_are(tmp_path):
    study = read_study(write(tmp_path))
    assert (study.name, study.reference, study.seeds) == ("study", "detach", (3, 5))
    runs = study_runs(study, "start")
    # seeds outermost: any beginning of the list is balanced
    titles = [run.title for run in runs]
    assert titles[:4] == ["detach seed 3", "none seed 3", "fast seed 3", "detach seed 5"]
    config = runs[5].config
    assert (config.seed, config.rl.init_from, config.rl.steps) == (5, "start", 4)
    assert (config.rl.optimizer.lr, config.mtp.preset) == (1e-2, "detach")
    assert Path(config.run_dir) == tmp_path / "out" / "runs" / "fast" / "seed_5"


def test_a_count_of_seeds_begins_at_0_and_the_command_line_wins(tmp_path):
    path = write(tmp_path)
    overrides = ["seeds=3", "folder=elsewhere", "reference=none", "rl.steps=7"]
    study = read_study(path, overrides)
    assert (study.seeds, study.folder, study.reference) == ((0, 1, 2), Path("elsewhere"), "none")
    assert study.config("fast").rl.steps == 7


def test_the_base_is_relative_to_the_study():
    for path in (CONF / "compare").glob("*.yaml"):
        study = read_study(path)
        assert study.reference in study.arms


def test_shipped_studies_measure_what_they_say():
    for name in ("demo", "planning"):
        study = read_study(CONF / "compare" / f"{name}.yaml")
        config, reference = study.config("detach_lr_1.3"), study.config("detach").rl.optimizer.lr
        assert config.rl.optimizer.lr == pytest.approx(1.3 * reference)
        presets = {study.config(arm).mtp.preset for arm in study.arms}
        assert presets == set(PRESETS["mtp.preset"]) - {"head_only"}
        # by the clock the drafts of one arm would be others than those of another
        assert config.rl.rollout.speculative.mode == "fixed"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seeds: [3, 5]",
            "seed: 4",
            "study.yaml:5: unknown key seed of a study. Did you mean seeds",
        ),
        ("seeds: [3, 5]", "seeds: [3, 3]", "must be how many (8 means 0 to 7), or a list of diff"),
        ("seeds: [3, 5]", "seeds: 0", "seeds = 0: must be how many"),
        ("seeds: [3, 5]", "seeds: true", "seeds = true: must be how many"),
        (
            "  none: [mtp",
            "  detahc: [mtp.preset=none]\n  a b: [mtp",
            "arm 'a b': a name is letters",
        ),
        ("[mtp.preset=none]", "mtp.preset=none", "must be a list of key=value"),
        (
            "[mtp.preset=none]",
            "[mtp.prest=none]",
            "unknown key mtp.prest. Did you mean mtp.preset?",
        ),
        ("[mtp.preset=none]", "[mtp.preset=nnoe]", "Did you mean none?"),
        ("[mtp.preset=none]", "[seed=3]", "arm none: seed=3: the seeds of a study are its key"),
        ("[mtp.preset=none]", "[rl.steps=9]", "it is the same for all arms of a study"),
        ("[mtp.preset=none]", "['model={num_layers: 1}']", "it is the same for all arms"),
        ("[rl.steps=4]", "[run_dir=x]", "overrides: run_dir=x: a run's folder is FOLDER/runs"),
        ("[rl.steps=4]", "[pretrain.steps=0]", "the arms would start from random weights"),
        ("[rl.steps=4]", "[model.from_hf=/x]", "each run would convert it again"),
        ("[mtp.preset=none]", "[mtp.preset=occ, rl.mini_batches=1]", "rl.mini_batches=1: "),
        ("overrides:", "reference: detatch\noverrides:", "is no arm. Did you mean detach?"),
        ("base:", "based_on:", "base is missing"),
    ],
)
def test_a_study_that_does_not_fit_is_refused(tmp_path, old, new, message):
    assert message in refused(tmp_path, old, new)


def with_include(folder, included, text=TEXT):
    (folder / "common.yaml").write_text(included)
    return read_study(write(folder, f"include: common.yaml\n{text}"))


def test_included_arms_and_overrides_come_first_and_the_studys_own_win(tmp_path):
    included = """
overrides: [rl.steps=9, rl.mini_batches=2]
seeds: 7
arms:
  ce: [mtp.preset=ce]
  fast: [mtp.preset=none]
"""
    study = with_include(tmp_path, included)
    assert list(study.arms) == ["ce", "fast", "detach", "none"]
    assert study.arms["fast"] == ("mtp.preset=detach", "rl.optimizer.lr=1e-2")
    assert study.overrides == ("rl.steps=9", "rl.mini_batches=2", "rl.steps=4")
    assert study.seeds == (3, 5) and study.config("ce").rl.steps == 4


@pytest.mark.parametrize(
    ("included", "message"),
    [
        ("base: x.yaml", "common.yaml:1: base: belongs into the study itself"),
        ("include: study.yaml", "common.yaml:1: include: belongs into the study itself"),
        ("arm: {}", "common.yaml:1: unknown key arm of a study. Did you mean arms?"),
        ("arms: 3", "common.yaml:1: arms = 3: must map names to lists"),
        ("overrides: 3", "common.yaml:1: overrides = 3: must be a string or a list"),
        ("arms:\n  x: [mtp.prest=ce]", "unknown key mtp.prest. Did you mean mtp.preset?"),
    ],
)
def test_what_an_included_file_does_wrong_is_told_by_its_name(tmp_path, included, message):
    with pytest.raises(ConfigError) as caught:
        with_include(tmp_path, included)
    assert message in str(caught.value)


def test_a_missing_include_names_who_asked(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: not found, included by"):
        read_study(write(tmp_path, f"include: nothing.yaml\n{TEXT}"))


def test_everything_wrong_with_the_file_is_told_at_once(tmp_path):
    text = refused(tmp_path, "seeds: [3, 5]", "seed: 4\nreference: 7")
    assert "unknown key seed" in text and "reference = 7: must be a string" in text


def test_one_arm_has_nothing_to_be_compared_with(tmp_path):
    text = TEXT[: TEXT.index("  none:")]
    with pytest.raises(ConfigError, match="detach alone has nothing to be compared with"):
        read_study(write(tmp_path, text))


def test_a_study_pretrains_unless_it_is_given_a_checkpoint(tmp_path):
    study = read_study(write(tmp_path))
    start = start_run(study)
    assert (start.command, start.folder) == ("pretrain", tmp_path / "out" / "start")
    with pytest.raises(ConfigError, match="has not pretrained yet"):
        start_checkpoint(study)
    folder = start.folder / "checkpoints" / "pretrain"
    for name in ("step_000040", "step_000060", "step_000080.tmp"):
        (folder / name).mkdir(parents=True)
    assert start_checkpoint(study) == folder / "step_000060"

    given = read_study(write(tmp_path), ["rl.init_from=runs/other"])
    assert start_run(given) is None
    assert start_checkpoint(given) == Path("runs/other")


def begin(run, *lines):
    """A run folder as the run itself would leave it."""
    run.folder.mkdir(parents=True)
    save_config(run.config, run.folder / "config.yaml")
    (run.folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


STEP = '{"phase": "rl", "step": 1, "time": 1.0, "entropy": 1.0}'
END = '{"phase": "event", "step": 4, "time": 2.0, "kind": "finished", "message": ""}'


def test_the_state_of_a_run_is_read_from_its_log(tmp_path):
    first, second, third, *_ = study_runs(read_study(write(tmp_path)), "start")
    begin(second, STEP)
    begin(third, STEP, END)
    assert [run.state for run in (first, second, third)] == ["missing", "unfinished", "finished"]
    assert [run.words()[-1] == "--resume" for run in (first, second)] == [False, True]
    # resumed for longer, and not at its new end yet
    with (third.folder / "metrics.jsonl").open("a") as file:
        file.write(f"{STEP}\n")
    assert third.state == "unfinished"


def test_a_run_of_another_study_file_is_refused_by_name(tmp_path):
    path = write(tmp_path)
    runs = study_runs(read_study(path), "start")
    begin(runs[0], STEP)
    begin(runs[2], STEP, END)
    check_runs(runs)
    check_runs(study_runs(read_study(path, ["rl.save_every=2"]), "start"))
    write(tmp_path, TEXT.replace("lr=1e-2", "lr=2e-2"))
    with pytest.raises(ConfigError) as caught:
        check_runs(study_runs(read_study(path), "start"))
    text = str(caught.value)
    assert f"{runs[2].folder}: rl.optimizer.lr was 0.01, is 0.02" in text
    assert str(runs[0].folder) not in text


def test_pretraining_need_not_know_what_rl_does(tmp_path):
    path = write(tmp_path)
    begin(start_run(read_study(path)), STEP, END)
    check_runs([start_run(read_study(path, ["rl.steps=9"]))])
    with pytest.raises(ConfigError, match=r"pretrain\.steps was 60, is 70"):
        check_runs([start_run(read_study(path, ["pretrain.steps=70"]))])
