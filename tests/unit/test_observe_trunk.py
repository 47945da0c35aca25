"""Does MTP move the trunk: the verdict's rules, its numbers, and the section of the report."""

from __future__ import annotations

import io
import re
from html import unescape

import pytest

from megatron_occ.observe import print_summary, write_report
from megatron_occ.observe.exact_log import ExactLog, mean_of, running_means
from megatron_occ.observe.regime import trunk_regime
from megatron_occ.observe.run_data import load_run
from megatron_occ.observe.trunk_effect import trunk_verdict
from tests.unit.observe_runs import DETACH, EXACT, LOGPROB, config, exact_step, write_run

LAYERS = ("/embedding", "/layer 1", "/layer 2", "/layer 10", "/output")
TITLE = "Does MTP move the trunk?"


def verdict_of(folder, text, steps):
    return trunk_verdict(load_run(write_run(folder, text, steps)))


def section_of(folder, text, steps):
    """HTML of the section, "" if the report has none."""
    page = write_report(write_run(folder, text, steps)).read_text("utf-8")
    found = re.search(rf"<section><h2>{re.escape(TITLE)}</h2>.*?</section>", page, re.DOTALL)
    return found.group() if found else ""


def words(html):
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def path_heights(path):
    """The y positions of a path of absolute M and L commands."""
    return [float(y) for y in re.findall(r"[ML][-\d.]+ ([-\d.]+)", path)]


def test_the_gate_passed_in_few_steps_is_detach_in_all_but_name(tmp_path):
    steps = [exact_step() for _ in range(147)] + [exact_step(acted=0.2, share=0.04)] * 3
    verdict = verdict_of(tmp_path, config(EXACT), steps)
    # 3 * 4% / 150
    assert verdict.sentence == (
        "MTP's gradient passed gate and bounds in 3 of 150 steps and was at most 4.0% of RL's "
        "part of the trunk's update, 0.1% on average: this run is detach in all but name."
    )
    assert verdict.answer == "Hardly"


@pytest.mark.parametrize(
    ("share", "answer"),
    [(0.009, "Hardly"), (0.011, "A little"), (0.099, "A little"), (0.101, "Yes")],
)
def test_the_answer_goes_by_the_mean_share(tmp_path, share, answer):
    steps = [exact_step(acted=0.1, share=2 * share), exact_step()]
    verdict = verdict_of(tmp_path, config(EXACT), steps)
    assert verdict.answer == answer
    assert "in 1 of 2 steps" in verdict.sentence
    assert f"at most {200 * share:.1f}%" in verdict.sentence


def test_between_measurements_a_head_of_its_own_adds_nothing(tmp_path):
    trunk = {**EXACT, "exact": {**EXACT["exact"], "every": 4}}
    steps = [exact_step(acted=0.1, share=0.2), exact_step(acted=0.1, share=0.2)]
    verdict = verdict_of(tmp_path / "own", config(trunk), steps)
    # 20% in one mini-batch of four
    assert verdict.answer == "A little"
    text = "was 5.0% of RL's on average (over all mini-batches; it acts in one of 4), at most 20"
    assert text in verdict.sentence and "in 2 of 2 steps" in verdict.sentence
    # every second step has a measured mini-batch
    sparse = [exact_step(acted=0.1, share=0.2), {"lambda/mtp_1": 0.0}] * 3
    verdict = verdict_of(tmp_path / "sparse", config(trunk), sparse)
    assert "gate and bounds in 3 of 3 measured steps" in verdict.sentence
    shared = verdict_of(tmp_path / "shared", config(trunk, head="same_as_trunk"), steps)
    assert shared.answer == "Yes" and "acts in one of" not in shared.sentence


def test_a_gate_that_never_opened_is_detach_or_rl_alone(tmp_path):
    steps = [exact_step() for _ in range(5)]
    verdict = verdict_of(tmp_path / "own", config(EXACT), steps)
    assert verdict.answer == "No"
    assert verdict.sentence == (
        "MTP's gradient passed gate and bounds in none of 5 steps: this run is detach in all but "
        "name."
    )
    joint = verdict_of(tmp_path / "joint", config(EXACT, head="same_as_trunk"), steps)
    assert joint.sentence.endswith("RL alone trained the trunk, in all but name.")


def test_without_a_gate_or_in_the_plain_metric_the_words_say_so(tmp_path):
    trunk = {**EXACT, "exact": {"metric": "euclidean", "gate": 0}}
    verdict = verdict_of(tmp_path, config(trunk), [exact_step(acted=0.1, share=0.2)])
    assert "passed the bounds in 1 of 1 step;" in verdict.sentence
    assert "its part of the trunk's gradient was 20.0%" in verdict.sentence


def test_lambda_without_a_measurement_is_no_verdict(tmp_path):
    verdict = verdict_of(tmp_path / "a", config(EXACT), [{"lambda/mtp_1": 0.0}])
    assert (verdict.answer, verdict.sentence) == (
        "Not measured",
        "No mini-batch was measured yet.",
    )
    assert verdict_of(tmp_path / "b", config(EXACT), [{}]).answer == "Not measured"


@pytest.mark.parametrize(
    ("text", "answer", "sentence"),
    [
        (
            config(DETACH, preset="detach"),
            "No",
            "mtp.preset=detach sends nothing of MTP into the trunk: RL alone trained it.",
        ),
        (
            config(DETACH),
            "No",
            "mtp.trunk.signal=none sends nothing of MTP into the trunk: RL alone trained it.",
        ),
        (
            config(DETACH, train_trunk=False),
            "No",
            "The trunk was frozen (rl.train_trunk=false): nothing moved it.",
        ),
        (
            config({"signal": "ce", "coefficient": "fixed", "weight": 0}),
            "No",
            "mtp.trunk.weight=0 sends nothing of MTP into the trunk: RL alone trained it.",
        ),
        (
            config({"signal": "ce", "coefficient": "fixed", "weight": 0.1}),
            "Not measured",
            "MTP's cross-entropy acts on the trunk with the fixed weight 0.100; what share of the "
            "update that is, was not measured.",
        ),
        (
            config({"signal": "policy", "coefficient": "fixed", "weight": 1.0}),
            "Not measured",
            "MTP's policy loss acts on the trunk with the fixed weight 1.00; what share of the "
            "update that is, was not measured.",
        ),
    ],
)
def test_regimes_without_a_coefficient(tmp_path, text, answer, sentence):
    verdict = verdict_of(tmp_path, text, [{"lambda/mtp_1": 0.0}])
    assert (verdict.answer, verdict.sentence) == (answer, sentence)
    assert ("megatron-occ audit" in verdict.reason) == (answer == "Not measured")


def test_a_model_without_mtp_layers(tmp_path):
    text = config(EXACT).replace("num_layers: 1", "num_layers: 0")
    assert "no MTP layers" in verdict_of(tmp_path, text, [{}]).sentence


@pytest.mark.parametrize("estimator", ["logprob", "released"])
def test_a_proxy_says_how_large_lambda_was_and_claims_no_share(tmp_path, estimator):
    text = config({**LOGPROB, "estimator": estimator})
    steps = [{"lambda/mtp_1": value} for value in (0.0, 0.0, 0.02, 0.04)]
    verdict = verdict_of(tmp_path / "some", text, steps)
    assert verdict.answer == "Not measured"
    assert verdict.sentence == (
        "λ was not 0 in 2 of 4 steps, 0.015 on average and at most 0.040; what share of the "
        "trunk's update that is, was not measured."
    )
    zeros = verdict_of(tmp_path / "none", text, steps[:2])
    assert (zeros.answer, zeros.reason) == ("No", "")
    assert zeros.sentence == "λ was 0 in all 2 steps: this run is detach in all but name."


@pytest.mark.parametrize("text", ["", "mtp: 3", "mtp: [1\n", "seed: 1\n", "mtp: {trunk: null}"])
def test_without_a_section_mtp_trunk_there_is_no_verdict(tmp_path, text):
    assert trunk_regime(text) is None
    section = section_of(tmp_path, text, [{"lambda/mtp_1": 0.5}])
    assert "Calibration coefficient λ" in section
    assert 'class="verdict"' not in section


def test_pretraining_alone_has_no_verdict(tmp_path):
    write_run(tmp_path, config(EXACT), [])
    (tmp_path / "metrics.jsonl").write_text('{"phase": "pretrain", "step": 1, "loss/main": 2.0}\n')
    assert trunk_verdict(load_run(tmp_path)) is None
    assert TITLE not in write_report(tmp_path).read_text("utf-8")


def test_the_configuration_is_that_of_the_rl_part(tmp_path):
    write_run(tmp_path / "rl", config(EXACT), [exact_step()])
    write_run(tmp_path / "pretrain", config(DETACH), [])
    (tmp_path / "pretrain" / "metrics.jsonl").write_text('{"phase": "pretrain", "step": 1}\n')
    for order in (["pretrain", "rl"], ["rl", "pretrain"]):
        run = load_run(tmp_path, [tmp_path / name for name in order])
        assert run.rl_config == config(EXACT)


def test_means_have_the_standard_error_of_a_mean():
    points = [(step, float(step)) for step in (1, 2, 3, 4)]
    whole = mean_of(points)
    # variance (2.25 + 0.25 + 0.25 + 2.25) / 3 over 4 values
    assert (whole.value, whole.count) == (2.5, 4)
    assert whole.error == pytest.approx((5 / 3 / 4) ** 0.5)
    running = running_means(points)
    assert [step for step, _ in running] == [1, 2, 3, 4]
    assert running[1][1].value == 1.5
    assert running[1][1].error == pytest.approx(0.5)
    assert running[-1][1].error == pytest.approx(whole.error)
    assert mean_of([]) is None


def test_clear_of_zero_needs_two_errors_and_eight_steps():
    clear = mean_of([(step, 1.0 + step % 2) for step in range(8)])
    assert clear.is_clear
    assert not mean_of([(step, 1.0 + step % 2) for step in range(7)]).is_clear
    assert not mean_of([(step, step % 2 - 0.5) for step in range(8)]).is_clear


def test_groups_of_layers_add_up_to_the_trunk(tmp_path):
    step = exact_step(groups=("/layer 1", "/layer 2"), c_cross=1.0)
    step |= {"exact/rl_norm_squared/layer 2": 300.0, "exact/share/layer 1": 0.4}
    log = ExactLog(load_run(write_run(tmp_path, config(EXACT), [step])))
    assert log.total("rl_norm_squared") == [(1.0, 400.0)]
    # norms: MTP's part 0.4 * 10 in the first layer, RL 20 in both
    assert log.share() == [(1.0, pytest.approx(0.2))]
    # c 10 and 2, over sqrt(400 * 50)
    assert log.cosines(1, "same") == [(1.0, pytest.approx(10 / 20000**0.5))]
    assert log.cosines(1, "cross") == [(1.0, pytest.approx(2 / 20000**0.5))]
    assert log.rl_signal_share() == [(1.0, pytest.approx(2 / 400))]


def test_layers_stay_in_order_and_depths_are_found(tmp_path):
    log = ExactLog(load_run(write_run(tmp_path, config(EXACT), [exact_step(2, LAYERS)])))
    assert (log.groups, log.depths, log.per_layer) == (list(LAYERS), [1, 2], True)


def test_steps_without_a_cross_pair_are_left_out(tmp_path):
    first = exact_step(c_cross=5.0)
    del first["exact/c_cross_1"], first["exact/rl_signal"]
    steps = [first, exact_step(c_cross=5.0), exact_step(c_cross=float("nan"))]
    log = ExactLog(load_run(write_run(tmp_path, config(EXACT), steps)))
    assert log.cosines(1, "cross") == [(2.0, pytest.approx(0.1))]
    assert [step for step, _ in log.cosines(1, "same")] == [1.0, 2.0, 3.0]
    assert log.rl_signal_share() == [(2.0, 0.01), (3.0, 0.01)]


@pytest.mark.parametrize(
    ("mean", "clear", "noise"), [(0.0, False, True), (1.0, True, True), (4.0, True, False)]
)
def test_the_reason_tells_alignment_from_shared_noise(tmp_path, mean, clear, noise):
    # cosine same 0.1 plus or minus 0.02, cosine cross mean / 50 plus or minus 0.01
    steps = []
    for sign in (1, -1) * 8:
        step = exact_step(c_cross=mean + 0.5 * sign)
        steps.append(step | {"exact/c_same_1": 5.0 + sign})
    reason = verdict_of(tmp_path, config(EXACT), steps).reason
    # sqrt(16 / 15) * 0.01 / 4
    assert f"± 0.0026, {'clear' if clear else 'not clear'} of 0" in reason
    assert ("mostly shared noise" in reason) == noise
    assert "of the same mini-batch 0.10" in reason


def test_pairs_of_the_same_mini_batch_measure_no_alignment(tmp_path):
    step = exact_step(acted=0.2, share=0.2)
    del step["exact/c_cross_1"], step["exact/rl_signal"]
    verdict = verdict_of(tmp_path, config(EXACT), [step] * 3)
    assert "alignment and shared noise can't be told apart" in verdict.reason
    section = words(section_of(tmp_path, config(EXACT), [step] * 3))
    assert "Signal in RL's gradient" not in section
    assert "What independent mini-batches agree in" not in section


def test_the_section_has_figures_and_four_plots(tmp_path):
    steps = [exact_step(acted=0.1 * (n > 5), share=0.02 * (n > 5)) for n in range(12)]
    html = section_of(tmp_path, config(EXACT), steps)
    text = words(html)
    assert html.count("<svg") == 4
    assert "MTP's part 2.0% in the end, of RL's part of the update; median 1.0%" in text
    assert "6 of 12 steps" in text
    assert "1.0 ± 0.0%" in text  # RL's signal
    assert "0.50 ± 0.25" in text  # lambda measured
    assert "0 of 12 steps" in text  # 0.5 is not more than 2 * 0.25
    assert "Calibration coefficient λ" not in text


def test_the_band_is_two_standard_errors_and_what_acted_lies_over_it(tmp_path):
    html = section_of(tmp_path, config(EXACT), [exact_step() for _ in range(20)])
    first = html[html.index("<svg") : html.index("</svg>")]
    band = path_heights(re.search(r'class="band c2" d="([^"]+)"', first).group(1))
    lines = re.findall(r'class="line c(\d)" d="([^"]+)"', first)
    assert [color for color, _ in lines] == ["2", "1"]
    measured, acted = (set(path_heights(path)) for _, path in lines)
    # lambda 0.5 +- 2 * 0.25 reaches from 1 to 0, where nothing acted
    assert acted == {max(band)}
    assert measured.pop() == pytest.approx((max(band) + min(band)) / 2, abs=0.1)
    assert not measured


def test_two_depths_have_a_panel_each_and_a_row_each(tmp_path):
    html = section_of(tmp_path, config(EXACT), [exact_step(2)] * 10)
    text = words(html)
    assert html.count("<svg") == 5
    assert "Depth 1 0.50 ± 0.25" in text
    assert "Depth 2 1.0 ± 0.25" in text
    assert "c cross, depth 2" in text


def test_layers_are_shown_with_what_acts(tmp_path):
    html = section_of(tmp_path, config(EXACT), [exact_step(groups=LAYERS, acted=0.3, share=0.1)])
    text = words(html)
    at = [text.index(f" {name[1:]} ") for name in LAYERS]
    assert at == sorted(at)
    assert text.count("0.30") >= len(LAYERS)
    assert "λ measured, in the end" not in text


def test_spikes_do_not_flatten_the_coefficient(tmp_path):
    steps = [exact_step() for _ in range(20)]
    steps[0] |= {"exact/lambda_raw_1": 50.0, "exact/lambda_error_1": 100.0}
    html = section_of(tmp_path, config(EXACT), steps)
    first = html[html.index("<svg") : html.index("</svg>")]
    assert "1 point outside the range shown" in first


@pytest.mark.parametrize("trunk", [DETACH, {**DETACH, "signal": "ce"}])
def test_a_constant_needs_no_plot(tmp_path, trunk):
    html = section_of(tmp_path, config(trunk), [{"lambda/mtp_1": 0.1, "calibration/cross_1": 1.0}])
    assert 'class="verdict"' in html
    assert "<svg" not in html


def test_sums_of_log_probs_are_shown_where_lambda_is_made_of_them(tmp_path):
    steps = [{"lambda/mtp_1": 0.1, "calibration/cross_1": 1.0}] * 2
    for estimator in ("logprob", "released"):
        text = config({**LOGPROB, "estimator": estimator})
        html = section_of(tmp_path / estimator, text, steps)
        assert "Calibration coefficient λ" in html
        assert ("What λ is made of" in html) == (estimator == "logprob")


def test_a_configuration_is_escaped(tmp_path):
    html = section_of(tmp_path, config(DETACH, preset="<script>"), [{}])
    assert "<script>" not in html
    assert "mtp.preset=&lt;script&gt;" in html


def test_the_summary_answers_in_a_line(tmp_path):
    write_run(tmp_path, config(DETACH, preset="detach"), [{"lambda/mtp_1": 0.0}])
    stream = io.StringIO()
    print_summary(tmp_path, stream=stream)
    found = [line for line in stream.getvalue().splitlines() if "MTP -> trunk" in line]
    assert [line.split("  ")[-1] for line in found] == [
        "No: mtp.preset=detach sends nothing of MTP into the trunk: RL alone trained it."
    ]
