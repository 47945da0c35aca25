"""Where a run's checkpoint comes from: its config.json and tokenizer go back with the weights."""

from __future__ import annotations

import pytest

from megatron_occ.config import load_config
from megatron_occ.config.load import save_config
from megatron_occ.convert.origin import origin_of


def make_run(folder, *given):
    step = folder / "checkpoints" / "rl" / "step_000100"
    step.mkdir(parents=True)
    save_config(load_config([], [f"run_dir={folder}", *given]), folder / "config.yaml")
    return step


@pytest.fixture
def imported(tmp_path):
    side = tmp_path / "imported" / "hugging_face"
    side.mkdir(parents=True)
    (side / "config.json").write_text("{}")
    return tmp_path / "imported"


def test_an_imported_checkpoint_brings_it(imported):
    assert origin_of(imported, None) == imported / "hugging_face"


def test_a_run_that_started_from_a_folder_has_it(tmp_path):
    step = make_run(tmp_path / "run")
    assert origin_of(step, None) is None
    side = tmp_path / "run" / "from_hf" / "hugging_face"
    side.mkdir(parents=True)
    (side / "config.json").write_text("{}")
    assert origin_of(step, None) == side


def test_a_run_that_started_from_a_checkpoint_asks_that(tmp_path, imported):
    first = make_run(tmp_path / "first", f"rl.init_from={imported}")
    second = make_run(tmp_path / "second", f"rl.init_from={first}")
    assert origin_of(second, None) == imported / "hugging_face"
    # characters are written anew; the files of another tokenizer would be wrong
    characters = {"kind": "char", "alphabet": "ab"}
    assert origin_of(second, characters) == imported / "hugging_face"
    assert origin_of(second, {"kind": "hf", "vocab_sha256": "1"}) is None
    (imported / "hugging_face" / "tokenizer.json").write_text("{}")
    assert origin_of(second, characters) is None


def test_runs_that_start_from_each_other_end(tmp_path):
    step = make_run(tmp_path / "run", f"rl.init_from={tmp_path / 'run/checkpoints/rl/step_000100'}")
    assert origin_of(step, None) is None


def test_a_configuration_of_another_version_says_nothing(tmp_path):
    step = make_run(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("colour: red\n")
    assert origin_of(step, None) is None
