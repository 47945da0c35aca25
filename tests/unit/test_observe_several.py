"""Several runs side by side: figures by hand, names told apart, what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from megatron_occ.cli import main
from megatron_occ.observe.several import NOTHING, differences, labels_of, load_several, remarks
from megatron_occ.observe.several_figures import figures, terminal_table
from megatron_occ.observe.several_page import render_side_by_side
from tests.unit.test_observe_report import Page

TASK = {"task": {"name": "star_paths", "params": {"degree": 2}}, "prompts": None}


def write(folder, rates, rewards, *, phase="rl", finished=True, settings=None):
    """A run with a validation for each rate at steps 0, 10, ... and a line for each reward."""
    folder.mkdir(parents=True)
    lines = [
        {"phase": "validation", "step": 10 * n, "time": 1.0, "pass@1": rate, "problems": 8.0}
        for n, rate in enumerate(rates)
    ]
    for step, reward in enumerate(rewards, start=1):
        times = {"time/rollout": 1.0 * step, "time/train": 0.5, "time/save": 100.0}
        values = {"reward/mean": reward, "lambda/mtp_1": 0.1 * step, "loss/main": reward}
        lines.append({"phase": phase, "step": step, "time": 1.0, **values, **times})
    if finished:
        lines.append({"phase": "event", "step": 9, "time": 2.0, "kind": "finished", "message": ""})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"run_dir": str(folder), "seed": 0, "data": TASK, **(settings or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write(tmp_path / "a" / "run", [0.25, 0.75, 0.5], [0.0, 0.2, 0.4]),
        write(tmp_path / "b" / "run", [0.25, 0.5, 0.5], [0.1], settings={"seed": 3}),
    ]


def refused(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, words)])
    return str(caught.value.code)


def test_figures_are_those_worked_out_by_hand(folders):
    found = dict(figures(load_several(folders)))
    assert found["pass@1 first"] == ["25.0%", "25.0%"]
    assert found["pass@1 final"] == ["50.0%", "50.0%"]
    assert found["pass@1 best (step)"] == ["75.0% (10)", "50.0% (10)"]
    # three values: the mean of the first two and of the last two
    assert found["reward"] == ["0.100 → 0.300", "0.100 → 0.100"]
    assert found["lambda"] == ["0.200", "0.100"]
    # medians of 1.5, 2.5, 3.5 and of 1.5: saving is not of the step
    assert found["seconds a step"] == ["2.50", "1.50"]
    assert "entropy" not in found  # neither logged it


def test_names_that_collide_get_as_much_of_the_path_as_tells_them_apart(tmp_path):
    def labels(*names):
        return labels_of([tmp_path / name for name in names])

    assert labels("a/run", "b/other") == ["run", "other"]
    assert labels("a/run", "b/run", "c") == ["a/run", "b/run", "c"]
    assert labels("x/a/run", "y/a/run") == ["x/a/run", "y/a/run"]
    assert labels("x", "x/x") == [f"{tmp_path.name}/x", "x/x"]


def test_what_differs_leaves_out_the_folder_and_keeps_missing_keys_apart(folders, tmp_path):
    third = write(tmp_path / "c", [0.1], [0.1], settings={"log": {"tensorboard": True}})
    assert differences(load_several(folders)).values == {"seed": [0, 3]}
    found = differences(load_several([*folders, third]))
    assert found.values == {"seed": [0, 3, 0]}
    assert found.lacking == ["log.tensorboard"]


def test_other_tasks_and_missing_phases_are_said(folders, tmp_path):
    other = {"data": {**TASK, "task": {"name": "star_paths", "params": {"degree": 3}}}}
    pretraining = write(tmp_path / "c", [], [1.0], phase="pretrain", finished=False, settings=other)
    assert remarks(load_several(folders)) == []
    task, phase, status = remarks(load_several([*folders, pretraining]))
    assert "different problems (data.task.params)" in task
    assert "No RL step in c" in phase
    assert "c (not finished: the log ends at pretraining step 1)" in status


def test_the_command_writes_one_page_above_the_runs_and_prints_a_table(folders, tmp_path, capsys):
    main(["report", *map(str, folders)])
    printed = capsys.readouterr().out
    path = tmp_path / "side_by_side.html"
    assert printed.splitlines()[0].split() == ["a/run", "b/run"]
    assert f"page  {path}" in printed
    assert "seed" in printed
    page = Page(path.read_text("utf-8"))
    assert page.open == []
    assert "75.0% (10)" in page.text
    assert not {"script", "link", "img"} & set(page.tags)
    # the runs' own folders stay as they are
    assert sorted(p.name for p in folders[0].iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_the_page_goes_where_it_is_asked_for(folders, tmp_path, capsys):
    main(["report", *map(str, folders), "--output", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").is_file()
    assert not (tmp_path / "side_by_side.html").exists()
    assert "must be a file that ends in .html" in refused(capsys, *folders, "--output", tmp_path)
    gone = tmp_path / "missing" / "page.html"
    assert "No such file or directory" in refused(capsys, *folders, "--output", gone)
    assert "for several run folders" in refused(capsys, folders[0], "--output", gone)


def test_every_folder_at_fault_is_named_and_nothing_is_written(folders, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = refused(capsys, folders[0], empty, tmp_path / "gone")
    assert f"is {empty} the folder of a run?" in text
    assert f"{tmp_path / 'gone'} is not a folder" in text
    assert not (tmp_path / "side_by_side.html").exists()


def test_the_same_folder_twice_is_refused_by_whatever_name(folders, tmp_path, capsys):
    (tmp_path / "link").symlink_to(folders[0])
    text = refused(capsys, folders[0], tmp_path / "link", folders[1])
    assert f"{folders[0]} and {tmp_path / 'link'} are the same folder" in text


def test_more_runs_than_lines_are_refused(folders, capsys):
    assert "14 can be told apart" in refused(capsys, *folders, *range(13))


def test_runs_of_one_colour_differ_by_dashes(tmp_path):
    folders = [write(tmp_path / f"r{n}", [0.1], [0.1]) for n in range(9)]
    runs = load_several(folders)
    assert len({(run.color, run.dashed) for run in runs}) == 9
    assert [run.dashed for run in runs] == [False] * 7 + [True] * 2


def test_names_and_settings_are_escaped(tmp_path):
    attack = "<script>alert(1)<"
    folders = [
        write(tmp_path / attack, [0.1], [0.1], settings={attack: attack}),
        write(tmp_path / "b", [0.1], [0.1], settings={attack: "b"}),
    ]
    page = Page(render_side_by_side(load_several(folders)))
    assert "script" not in page.tags
    assert page.text.count(attack) >= 4


def test_a_run_without_a_configuration_is_compared_all_the_same(folders, tmp_path):
    (folders[1] / "config.yaml").unlink()
    runs = load_several(folders)
    assert "No configuration was found of b/run" in remarks(runs)[0]
    assert differences(runs).values == {}
    third = write(tmp_path / "c", [0.1], [0.1], settings={"seed": 5})
    runs = load_several([*folders, third])
    assert differences(runs).values == {"seed": [0, NOTHING, 5]}
    assert NOTHING in Page(render_side_by_side(runs)).text


def test_a_table_lines_its_columns_up():
    assert terminal_table(["a", "long"], [("x", ["1", "2"]), ("pass", ["123", "4"])]) == (
        "        a  long\nx       1     2\npass  123     4"
    )
