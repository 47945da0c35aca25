"""Table, page and files of an evaluation, from made-up figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_occ.observe import evaluation_page
from megatron_occ.observe.evaluation import EvaluationFolder, checkpoint_title, titles
from megatron_occ.observe.evaluation_table import shown_figures, table_text

DASH = "\N{EN DASH}"
NASTY = '<script>alert(1)</script> & "x"'


class Tags(HTMLParser):
    """Counts of tags, links, and what is left open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.links = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name == "href"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def figures(samples, value, error=0.02, **others):
    names = [f"avg@{samples}", *(f"pass@{k}" for k in range(1, samples + 1)), "truncated"]
    found = {name: {"value": value, "error": error} for name in names}
    found |= {"length": {"value": 1234.5, "error": error and 21.0}}
    return found | {name: {"value": v, "error": error} for name, v in others.items()}


def results_of(rows, sets, samples=4):
    kept = {"samples": samples, "temperature": 0.6, "top_p": 0.95, "top_k": None}
    return {
        "format": 1,
        "settings": {**kept, "max_response_length": 8192},
        "seed": 3,
        "sets": [{"name": name, "problems": 2, "source": f"{name}.jsonl"} for name in sets],
        "rows": [
            {"name": name, "checkpoint": f"runs/{name}", "sets": of, "average": average}
            | {"drafts": {}, "notes": {}}
            for name, of, average in rows
        ],
    }


def two_sets():
    with_majority = {"maj@4": 0.75}
    of = {"aime24": figures(4, 0.5, **with_majority), "b+c": figures(4, 0.25)}
    return results_of([("run rl 2", of, figures(4, 0.375, error=0.0141))], ["aime24", "b+c"])


def entry(problem, samples, text="one\ntwo"):
    responses = [
        {"sample": j, "response": f"{text} {j}", "score": float(j == 0), "correct": j == 0}
        | {"tokens": 7, "truncated": j == 1, "read": NASTY if j else "", "group": j - 1}
        for j in range(samples)
    ]
    prompt = f"question {problem} {NASTY}"
    return {
        **{"problem": problem, "place": f"file:{problem + 1}", "prompt": prompt, "answer": NASTY},
        **{"verifier": "math", "votes_problem": "", "responses": responses},
    }


def written(folder, results, problems=2, text="one\ntwo"):
    output = EvaluationFolder(folder, is_main=True)
    for row in results["rows"]:
        for each in results["sets"]:
            for problem in range(problems):
                output.write(row["name"], each["name"], entry(problem, 4, text))
    return output.finish(results)


def test_the_table_has_a_line_for_each_figure():
    assert table_text(two_sets()).splitlines() == [
        "4 responses a problem, temperature 0.6, top_p 0.95, at most 8,192 tokens, seed 3",
        "",
        "                          aime24         b+c     average",
        "avg@4                 50.0 ± 2.0  25.0 ± 2.0  37.5 ± 1.4",
        "pass@2                50.0 ± 2.0  25.0 ± 2.0  37.5 ± 1.4",
        "pass@4                50.0 ± 2.0  25.0 ± 2.0  37.5 ± 1.4",
        f"maj@4                 75.0 ± 2.0           {DASH}           {DASH}",
        "truncated             50.0 ± 2.0  25.0 ± 2.0  37.5 ± 1.4",
        "mean length (tokens)  1,234 ± 21  1,234 ± 21  1,234 ± 21",
    ]


def test_a_single_set_has_no_average_and_a_single_problem_no_error():
    results = results_of([("x", {"s": figures(1, 1.0, error=None)}, {})], ["s"], samples=1)
    assert table_text(results).splitlines()[2:] == [
        "                          s",
        "avg@1                 100.0",
        "truncated             100.0",
        "mean length (tokens)  1,234",
    ]


def test_checkpoints_are_rows_below_each_figure():
    of = {"s": figures(1, 0.5)}
    results = results_of([("one", of, {}), ("another", of, {})], ["s"], samples=1)
    results["rows"][1]["notes"] = {"s": ["a word"]}
    lines = table_text(results).splitlines()
    assert lines[3:5] == [
        "avg@1                 one      50.0 ± 2.0",
        "                      another  50.0 ± 2.0",
    ]
    assert lines[-1] == "another, s: a word"


@pytest.mark.parametrize(
    ("samples", "counts"), [(1, []), (2, [2]), (5, [2, 4, 5]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])]
)
def test_the_table_shows_pass_at_powers_of_two_and_all(samples, counts):
    results = results_of([("x", {"s": figures(samples, 0.5)}, {})], ["s"], samples)
    passes = [f"pass@{k}" for k in counts]
    assert shown_figures(results) == [f"avg@{samples}", *passes, "truncated", "length"]


def test_partial_credit_shows_pass_at_1_and_scores_beyond_1_as_they_are():
    of = figures(2, 0.5)
    of["avg@2"] = {"value": 7.25, "error": 0.5}
    results = results_of([("x", {"s": of}, {})], ["s"], samples=2)
    assert shown_figures(results)[:3] == ["avg@2", "pass@1", "pass@2"]
    assert re.search(r"avg@2 +7\.25 ± 0\.50\n", table_text(results))


def test_files_and_paths(tmp_path):
    folder = tmp_path / "eval"
    text = written(folder, two_sets())
    for name in ("evaluation.html", "results.json", "responses.jsonl"):
        assert str(folder / name) in text
    assert {path.name for path in folder.iterdir()} == {
        *("evaluation.html", "results.json", "responses.jsonl")
    }
    lines = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 4
    first = {"checkpoint": "run rl 2", "set": "aime24", "problem": 0, "place": "file:1"}
    assert first.items() <= lines[0].items()
    assert "votes_problem" not in lines[0] and "responses" not in lines[0]
    assert json.loads((folder / "results.json").read_text()) == two_sets()


def test_every_response_is_in_the_page_and_escaped(tmp_path):
    written(tmp_path, two_sets(), text=NASTY)
    page = (tmp_path / "evaluation.html").read_text("utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    tags = Tags(page)
    assert tags.open == []
    # two sets of two problems of four responses
    assert tags.counts["details"] == 2 * 2 * (1 + 4)
    assert page.count("1 of 4") == 4
    assert page.count("cut off at the limit") == 4
    assert page.count("no answer read") == 4


def test_many_responses_go_to_pages_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_page, "PAGE_BYTES", 8000)
    (tmp_path / "responses_99.html").write_text("of an earlier evaluation")
    written(tmp_path, two_sets(), problems=7)
    main = Tags((tmp_path / "evaluation.html").read_text("utf-8"))
    assert main.counts.get("details", 0) == 0
    assert main.links == sorted(main.links, key=lambda name: int(name[10:-5]))
    assert {*main.links} == {path.name for path in tmp_path.glob("responses_*.html")}
    assert len(main.links) > 2
    pages = [(tmp_path / name).read_text("utf-8") for name in main.links]
    assert all(Tags(page).open == [] for page in pages)
    assert sum(Tags(page).counts["details"] for page in pages) == 2 * 7 * (1 + 4)
    assert max(map(len, pages)) < 8000 + len(evaluation_page._style()) + 30_000


def test_an_interrupted_evaluation_leaves_the_one_before(tmp_path):
    written(tmp_path, two_sets())
    before = (tmp_path / "responses.jsonl").read_bytes()
    EvaluationFolder(tmp_path, is_main=True).write("x", "y", entry(0, 1))
    assert (tmp_path / "responses.jsonl").read_bytes() == before


def test_other_ranks_write_nothing(tmp_path):
    output = EvaluationFolder(tmp_path / "eval", is_main=False)
    output.write("x", "y", entry(0, 1))
    assert output.finish({}) == ""
    assert not (tmp_path / "eval").exists()


def test_titles_of_checkpoints():
    rl = Path("runs/dapo/checkpoints/rl/step_000040")
    assert checkpoint_title(rl) == "dapo rl 40"
    assert checkpoint_title(Path("runs/dapo/from_hf")) == "dapo from_hf"
    assert titles([rl, Path("runs/dapo/from_hf")]) == ["dapo rl 40", "dapo from_hf"]
    other = Path("old/dapo/checkpoints/rl/step_000040")
    assert titles([rl, other]) == [str(rl), str(other)]
