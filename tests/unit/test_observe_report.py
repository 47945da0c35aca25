"""The report and the summary: right numbers, escaped model output, missing files."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser

import pytest

from megatron_occ.observe import print_summary, write_report
from megatron_occ.observe.report_tables import config_block, is_correct, samples_section
from megatron_occ.observe.run_data import (
    Level,
    RunData,
    accuracy_basis,
    load_run,
    samples_per_second,
)


class Page(HTMLParser):
    """Collects tags and text, and checks that what is opened gets closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def put(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def rl_lines(steps, start=1000.0, **metrics):
    base = {"reward/mean": 0.25, "rollout/tokens_per_second": 900.0, "rollout/length_mean": 30.0}
    return [
        {"phase": "rl", "step": step, "time": start + 10.0 * step, **base, **metrics}
        for step in steps
    ]


def validation(step, value, time=1000.0, name="avg@4"):
    return {"phase": "validation", "step": step, "time": time, name: value, "problems": 100.0}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my run"
    put(
        folder / "pretrain",
        "metrics.jsonl",
        [
            {"phase": "pretrain", "step": s, "time": 100.0 + s, "loss/main": 3.0 - s / 50}
            for s in range(0, 101, 10)
        ]
        + [{"phase": "event", "step": 100, "time": 200.0, "kind": "finished", "message": "end"}],
    )
    lines = [validation(0, 0.41), *rl_lines(range(1, 21), **{"lambda/mtp_1": 0.1, "odd": 1.0})]
    lines += [validation(20, 0.675, 1200.0)]
    lines += [{"phase": "event", "step": 20, "time": 1200.0, "kind": "finished", "message": "end"}]
    put(folder / "rl", "metrics.jsonl", lines)
    sample = {"prompt": "2+2=", "response": "4", "answer": "4", "reward": 1.0}
    put(folder / "rl", "rollouts.jsonl", [{"step": s, **sample} for s in (1, 20)])
    (folder / "config.yaml").write_text("seed: 1\nname: <tiny> # 1 < 2\n")
    return folder


def page_of(folder, parts=None):
    text = write_report(folder, parts).read_text("utf-8")
    page = Page(text)
    assert page.open == []
    return text, page, " ".join(page.text)


def test_report_shows_the_key_figures(run_dir):
    _, page, words = page_of(run_dir)
    assert "my run" in words
    assert "finished" in words
    assert "41.0%" in words
    assert "67.5%" in words
    assert "+26.5 points" in words
    # shares 42/102 and 68.5/102: sqrt((0.4118 * 0.5882 + 0.6716 * 0.3284) / 100) = 0.0680
    assert "avg@4, 100 problems, standard error ≤ 6.8 points" in words
    assert "5 min 0 s" in words  # 100 s of pretraining, 200 s of RL
    assert "30.0" in words  # 900 tokens a second, 30 tokens each
    for title in ("Accuracy", "Calibration coefficient λ", "Loss", "Sample responses"):
        assert title in page.text


def test_report_needs_no_network_and_no_scripts(run_dir):
    text, page, _ = page_of(run_dir)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & set(page.attributes)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_model_output_is_escaped(run_dir):
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    sample = {"step": 1, "reward": attack, "finish_reason": attack, "advantage": 0.5}
    fields = {name: attack for name in ("prompt", "response", "answer")}
    put(run_dir / "rl", "rollouts.jsonl", [{**sample, **fields}])
    event = {"phase": "event", "step": 3, "time": 1.0, "message": attack}
    put(run_dir, "metrics.jsonl", [event, {"phase": "rl", "step": 1, "time": 1.0, attack: 1.0}])
    (run_dir / "config.yaml").write_text(f"name: {attack}\n{attack}: 1\n")
    _, page, words = page_of(run_dir)
    assert not {"script", "img"} & set(page.tags)
    assert words.count("<script>alert(1)</script>") >= 7


def test_text_that_is_not_unicode_can_be_written(run_dir):
    put(run_dir / "rl", "rollouts.jsonl", [{"step": 1, "response": "a\udc00\x00b", "reward": 0}])
    assert "a?\u2400b" in page_of(run_dir)[2]


def test_long_responses_are_cut_in_the_middle():
    response = "<" + "A" * 2999 + "B" * 2000 + "C" * 3000
    html = samples_section(RunData("r", samples=[{"step": 1, "response": response}]))
    assert "4,000 characters left out" in html
    assert "<pre>&lt;AAA" in html
    assert html.count("A") >= 1999
    assert "B" * 10 not in html
    assert html.count("C") >= 2000


def test_samples_mix_right_and_wrong_over_a_few_steps():
    samples = [
        {"step": step, "response": f"s{step}n{n}", "reward": float(n >= 5)}
        for step in range(1, 11)
        for n in range(8)
    ]
    html = samples_section(RunData("r", samples=samples))
    assert [step for step in range(1, 11) if f"<h3>Step {step}<" in html] == [1, 4, 7, 10]
    assert [n for n in range(8) if f"s1n{n}<" in html] == [0, 1, 5, 6]
    assert "3 of 8 logged responses right" in html


def test_what_counts_as_right():
    assert is_correct({"reward": 1.0})
    assert is_correct({"reward": -0.2, "correct": True})
    assert not is_correct({"reward": 0.0})
    assert not is_correct({"reward": "nan"})
    assert not is_correct({})


def test_pretraining_only(run_dir):
    _, page, words = page_of(run_dir, [run_dir / "pretrain"])
    assert "Pretraining" in page.text
    assert "Reinforcement learning" not in page.text
    assert "pass@1" not in words
    assert "Sample responses" not in page.text


def test_rl_only_without_config_and_rollouts(tmp_path):
    put(tmp_path / "x", "metrics.jsonl", rl_lines([1, 2]))
    _, page, words = page_of(tmp_path / "x")
    assert "Reinforcement learning" in page.text
    assert "Pretraining" not in page.text
    assert "not finished: the log ends at RL step 2" in words


def test_a_correction_is_drawn_where_there_is_one(tmp_path):
    shares = {"correction/rejected/tokens": 0.2, "correction/weight/effective": 0.9}
    put(tmp_path / "with", "metrics.jsonl", rl_lines([1, 2, 3], **shares))
    put(tmp_path / "without", "metrics.jsonl", rl_lines([1, 2, 3]))
    pages = [write_report(tmp_path / name).read_text() for name in ("with", "without")]
    for text in ("Correction for the rollout", "tokens rejected", "effective share of tokens"):
        assert [text in page for page in pages] == [True, False]
    assert "weights above the range" not in pages[0]


def test_a_stopped_run_with_a_broken_last_line_and_nan(tmp_path, caplog):
    lines = rl_lines([1, 2, 3], **{"lambda/mtp_1": "nan", "entropy": "inf", "grad_norm/trunk": 1.0})
    put(tmp_path, "metrics.jsonl", lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rl", "st')
    _, page, _ = page_of(tmp_path)
    assert "Gradient norms" in page.text
    assert "Calibration coefficient λ" not in page.text
    assert "metrics.jsonl, line 4: not a JSON object" in caplog.text


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="gone"):
        write_report(tmp_path, [tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"no metrics in .*metrics\.jsonl"):
        write_report(tmp_path)


def test_a_repeated_step_counts_once_and_the_later_line_wins(tmp_path):
    put(tmp_path, "metrics.jsonl", rl_lines([1, 2]) + rl_lines([2], entropy=5.0))
    run = load_run(tmp_path)
    assert run.points("rl", "reward/mean") == [(1.0, 0.25), (2.0, 0.25)]
    assert run.points("rl", "entropy") == [(2.0, 5.0)]


def test_wall_time_leaves_out_the_pause_before_a_resume(tmp_path):
    resumed = {"phase": "event", "step": 2, "time": 9000.0, "kind": "resumed", "message": "m"}
    lines = [*rl_lines([1, 2]), resumed, *rl_lines([3, 4], start=8980.0)]
    put(tmp_path, "metrics.jsonl", lines)
    assert load_run(tmp_path).wall_seconds == 10.0 + 10.0 + 10.0


def test_finished_only_if_nothing_was_trained_afterwards(tmp_path):
    end = {"phase": "event", "step": 2, "time": 1.0, "kind": "finished", "message": "m"}
    put(tmp_path, "metrics.jsonl", [*rl_lines([1, 2]), end])
    assert load_run(tmp_path).finished
    put(tmp_path, "metrics.jsonl", [*rl_lines([1, 2]), end, *rl_lines([3])])
    assert not load_run(tmp_path).finished


def test_pass_at_1_goes_before_averages_and_the_largest_k_wins(tmp_path):
    put(tmp_path, "metrics.jsonl", [validation(0, 0.5, name=n) for n in ("avg@4", "avg@32")])
    assert load_run(tmp_path).accuracy_metric == "avg@32"
    put(tmp_path, "metrics.jsonl", [validation(0, 0.5, name=n) for n in ("avg@32", "pass@1")])
    assert load_run(tmp_path).accuracy_metric == "pass@1"


def graded(step, rate, score):
    return {**validation(step, rate, name="pass@1"), "avg@4": score, "pass@4": rate}


def test_the_mean_score_of_partial_credit_is_shown_beside_pass_at_1(tmp_path):
    lines = [graded(0, 0.0, 0.25), *rl_lines([1, 2]), graded(2, 0.5, 0.75)]
    put(tmp_path, "metrics.jsonl", lines)
    _, _, words = page_of(tmp_path)
    assert "validation avg@4" in words
    stream = io.StringIO()
    print_summary(tmp_path, stream=stream)
    assert "sampled pass@1  0.0% -> 50.0%" in stream.getvalue()
    assert "mean score      0.250 -> 0.750  (avg@4)" in stream.getvalue()


def test_the_mean_of_zeros_and_ones_is_not_shown_twice(tmp_path):
    lines = [graded(0, 0.3, 0.1 + 0.2), *rl_lines([1, 2]), graded(2, 0.5, 0.5)]
    put(tmp_path, "metrics.jsonl", lines)
    _, _, words = page_of(tmp_path)
    assert "validation avg@4" not in words
    assert "validation pass@1" in words
    assert load_run(tmp_path).score_metric is None


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_acceptance_is_compared_where_every_pass_had_a_draft(tmp_path, share):
    drafts = [{"draft/acceptance_length": x, "draft/proposed_1": share} for x in (1.61, 1.83)]
    lines = [validation(step, 0.5) | each for step, each in zip((0, 9), drafts, strict=True)]
    put(tmp_path, "metrics.jsonl", lines)
    stream = io.StringIO()
    print_summary(tmp_path, stream=stream)
    assert ("1.61 -> 1.83" in stream.getvalue()) == (share == 1.0)


def test_samples_per_second_is_a_median_over_usable_steps(tmp_path):
    lines = rl_lines([1]) + rl_lines([2], **{"rollout/length_mean": 0.0})
    lines += rl_lines([3], **{"rollout/length_mean": 10.0})
    lines += rl_lines([4], **{"rollout/tokens_per_second": "nan"})
    lines += rl_lines([5], **{"rollout/length_mean": 20.0})
    put(tmp_path, "metrics.jsonl", lines)
    assert samples_per_second(load_run(tmp_path)) == 45.0  # of 30, 90, 45


def test_time_table_gives_shares_and_the_rest_as_other(tmp_path):
    times = {"time/rollout": 6.0, "time/train": 3.0, "time/step": 12.0}
    put(tmp_path, "metrics.jsonl", rl_lines([1, 2], **times))
    text, _, words = page_of(tmp_path)
    for share in ("50.0%", "25.0%"):
        assert share in words
        assert f"width:{share}" in text
    assert "other" in words
    assert "24.0 s" in words


def test_config_keys_are_marked_and_values_kept():
    html = config_block("a:\n  - b_c: http://x:1 # d: e\n  - plain\nlist: [1]\n")
    assert html == (
        "<pre><b>a</b>:\n  - <b>b_c</b>: http://x:1 # d: e\n  - plain\n<b>list</b>: [1]</pre>"
    )


def test_summary_is_short_and_names_the_report(run_dir):
    write_report(run_dir)
    stream = io.StringIO()
    print_summary(run_dir, stream=stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "my run: finished"
    assert "41.0% -> 67.5%  (+26.5 points; avg@4, 100 problems" in lines[1]
    assert any(line.split() == ["steps", "100", "pretraining,", "20", "RL"] for line in lines)
    assert lines[-1].endswith("report.html")
    assert len(lines) <= 8


@pytest.mark.parametrize(
    ("values", "level", "basis"),
    [
        ([7.0], Level(7.0, 7.0, 1), "first and last value logged"),
        ([1.0, 5.0], Level(1.0, 5.0, 1), "first and last value logged"),
        ([1.0, 3.0, 9.0], Level(2.0, 6.0, 2), "mean of the first and last 2 values logged"),
        (range(100), Level(4.5, 94.5, 10), "mean of the first and last 10 values logged"),
    ],
)
def test_a_level_is_the_mean_of_about_half_of_the_values_or_of_ten(values, level, basis):
    run = RunData("run", {"rl": {"reward/mean": dict(enumerate(values, start=1))}})
    assert run.level("rl", "reward/mean") == level
    assert level.basis == basis
    assert run.level("rl", "entropy") is None


def test_no_success_in_eight_problems_is_not_certain():
    values = {"pass@1": {0: 0.0, 2: 0.0}, "problems": {0: 8.0, 2: 8.0}}
    # shares 1/10 and 1/10: sqrt(2 * 0.09 / 8) = 0.15
    basis = accuracy_basis(RunData("run", {"validation": values}))
    assert basis == "8 problems, standard error ≤ 15.0 points"


def test_several_sets_have_curves_and_a_standard_error_of_their_own(tmp_path):
    """1/2 of 8 problems twice, and 1/4 and 3/4 of 2, with one more of each kind."""
    sets = {"small": (2.0, (0.25, 0.75)), "large": (8.0, (0.5, 0.5))}
    lines = []
    for place, step in enumerate((0, 4)):
        line = validation(step, (0.375, 0.625)[place], name="pass@1") | {"problems": 10.0}
        for name, (count, rates) in sets.items():
            line |= {f"{name}/pass@1": rates[place], f"{name}/problems": count}
        lines.append(line)
    put(tmp_path, "metrics.jsonl", lines)
    run = load_run(tmp_path)
    assert run.validation_sets == ["large", "small"]
    squares = 2 * 0.25 / 8 + (0.375 * 0.625 + 0.625 * 0.375) / 2
    expected = 100 * squares**0.5 / 2
    _, page, words = page_of(tmp_path)
    assert f"10 problems of 2 sets, standard error ≤ {expected:.1f} points" in words
    assert "Accuracy by set" in page.text
