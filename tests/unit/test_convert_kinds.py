"""A folder of another kind than was asked for: the message says what it is and what to name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.cli import main

CONVERSIONS = ("import", "export", "inspect")
NAMED = {"import": "no Hugging Face folder", "export": "no checkpoint", "inspect": "no checkpoint"}


def refused(command: str, folder: Path) -> str:
    target = [] if command == "inspect" else [str(folder.parent / "target")]
    with pytest.raises(SystemExit) as ended:
        main(["convert", command, str(folder), *target])
    assert not (folder.parent / "target").exists()
    return str(ended.value)


def run_folder(folder: Path) -> Path:
    """With checkpoints of both phases, and one that was being written."""
    for name in ("pretrain/step_000900", "rl/step_000010", "rl/step_000020", "rl/step_000030.tmp"):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "meta.json").write_text("{}")
    (folder / "config.yaml").touch()
    return folder


@pytest.mark.parametrize("command", CONVERSIONS)
@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/rl"])
def test_of_a_run_folder_the_newest_checkpoint_is_named(command, part, tmp_path):
    message = refused(command, run_folder(tmp_path / "run") / part)
    assert NAMED[command] in message
    newest = tmp_path / "run" / "checkpoints" / "rl" / "step_000020"
    assert message.endswith(f"it is a folder of a run, with checkpoints such as {newest}")


def test_a_checkpoint_needs_no_import(tmp_path):
    (tmp_path / "step_000010").mkdir()
    (tmp_path / "step_000010" / "meta.json").write_text("{}")
    message = refused("import", tmp_path / "step_000010")
    assert "a checkpoint of this project. It needs no import: rl.init_from takes it" in message


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    message = refused("export", tmp_path / "hf")
    assert "it is a Hugging Face folder. `convert import` makes a checkpoint of it" in message


@pytest.mark.parametrize("command", CONVERSIONS)
def test_other_things_are_told_apart(command, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert "there is no such folder. Give a folder" in refused(command, tmp_path / "none")
    assert "it is a file. Give a folder" in refused(command, tmp_path / "file")
    message = refused(command, tmp_path / "empty")
    assert "it has no config.json and no meta.json. Give a folder" in message
