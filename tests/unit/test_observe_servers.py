"""The report's table of rollout servers, and the plot of how old their weights are."""

from __future__ import annotations

import re
from html import unescape

import pytest
import yaml

from megatron_occ.observe import write_report
from megatron_occ.observe.run_data import load_run
from megatron_occ.observe.servers_section import SERVERS_SHOWN, most_telling, servers_of
from tests.unit.observe_runs import write_run

TITLE = "Rollout servers"
PLOT = "Weights of the rollout"
LAG = {"lag/mean": 0.5, "lag/max": 2.0, "lag/straddling": 0.25}
ATTACK = "http://<script>alert(1)</script>"


def server(number, **changed):
    """What a step logs of one server."""
    values = {
        "version": 4.0,
        "tokens_per_second": 100.0,
        "idle": 0.25,
        "requests": 8.0,
        "request_seconds": 2.0,
        **changed,
    }
    return {f"server/{number}/{name}": value for name, value in values.items()}


def config(*urls):
    return yaml.safe_dump({"rl": {"rollout": {"server": {"urls": list(urls)}}}})


def page_of(folder, steps, text=""):
    return write_report(write_run(folder, text, steps)).read_text("utf-8")


def section_of(page):
    """HTML of the section, "" if the report has none."""
    found = re.search(rf"<section><h2>{TITLE}</h2>.*?</section>", page, re.DOTALL)
    return found.group() if found else ""


def rows(page):
    """The cells of the table, without its head."""
    body = re.search(r"<tbody>(.*?)</tbody>", section_of(page), re.DOTALL).group(1)
    return [
        [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd]>.*?</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]


def servers(folder, steps, text=""):
    return servers_of(load_run(write_run(folder, text, steps)))


def test_a_row_has_the_end_the_means_and_the_sum(tmp_path):
    first = server(1, version=4.0, acceptance_length=1.5) | server(2)
    later = server(
        1,
        version=8.0,
        acceptance_length=1.75,
        tokens_per_second=300.0,
        idle=0.75,
        requests=24.0,
        request_seconds=4.0,
    )
    page = page_of(
        tmp_path, [first, later | server(2, version=8.0)], config("http://a", "http://b")
    )
    # (8 * 2 s + 24 * 4 s) / 32
    assert rows(page) == [
        ["http://a", "8", "1.75", "200", "50.0%", "3.5 s", "32"],
        ["http://b", "8", "\N{EN DASH}", "100", "25.0%", "2.0 s", "16"],
    ]
    assert "late" not in section_of(page)


def test_a_step_without_an_answer_says_nothing_of_the_speed(tmp_path):
    nothing = {"tokens_per_second": 0.0, "requests": 0.0, "request_seconds": 0.0, "idle": 1.0}
    page = page_of(tmp_path, [server(1) | server(2, **nothing), server(1, **nothing)])
    assert rows(page)[0][3:] == ["100", "62.5%", "2.0 s", "8"]
    dash = "\N{EN DASH}"
    assert rows(page)[1][3:] == [dash, "100.0%", dash, "0"]


def test_a_version_behind_the_others_is_marked(tmp_path):
    page = page_of(tmp_path, [server(1, version=12.0) | server(2, version=8.0)])
    assert [row[1] for row in rows(page)] == ["12", "4 behind 8"]
    assert section_of(page).count('class="late"') == 1


def test_a_server_that_a_resumed_run_gave_up_is_not_behind(tmp_path):
    steps = [server(1) | server(2), server(1, version=8.0)]
    page = page_of(tmp_path, steps, config("http://a"))
    assert [row[:2] for row in rows(page)] == [["http://a", "8"], ["server 2", "until step 1 4"]]
    assert 'class="late"' not in section_of(page)


def test_servers_are_in_the_order_of_their_numbers(tmp_path):
    found = servers(tmp_path, [server(10) | server(2) | server(1)])
    assert [(each.number, each.name) for each in found] == [
        (1, "server 1"),
        (2, "server 2"),
        (10, "server 10"),
    ]


def test_metrics_that_are_missing_leave_dashes(tmp_path):
    dash = "\N{EN DASH}"
    page = page_of(tmp_path, [{"server/1/idle": 0.5, "server/2/tokens_per_second": 7.0}])
    assert rows(page) == [
        ["server 1", dash, dash, dash, "50.0%", dash, dash],
        ["server 2", dash, dash, "7.00", dash, dash, dash],
    ]


def test_values_that_are_not_finite_are_left_out(tmp_path):
    broken = server(1, **dict.fromkeys(("tokens_per_second", "request_seconds", "version"), "nan"))
    page = page_of(tmp_path, [server(1), broken])
    assert rows(page) == [["server 1", "4", "\N{EN DASH}", "100", "25.0%", "2.0 s", "16"]]


@pytest.mark.parametrize(
    "text", ["", "a: [", "rl: 3", "rl: {rollout: {server: {urls: http://a}}}", config()]
)
def test_without_urls_servers_have_numbers(tmp_path, text):
    assert [each.name for each in servers(tmp_path, [server(1)], text)] == ["server 1"]


def test_urls_and_names_of_metrics_are_escaped(tmp_path):
    steps = [server(1) | {f"server/{ATTACK}/idle": 1.0, "server/1/<b>": 1.0, "server/0/idle": 1.0}]
    page = page_of(tmp_path, steps, config(ATTACK))
    assert "<script" not in page
    assert [row[0] for row in rows(page)] == [ATTACK]


def test_of_many_servers_those_stay_that_tell_most(tmp_path):
    changes = {7: {"tokens_per_second": 10.0}, 20: {"idle": 0.9}, 33: {"version": 3.0}}
    step = {}
    for number in range(1, 41):
        step |= server(number, **changes.get(number, {}))
    page = page_of(tmp_path, [step])
    names = [row[0] for row in rows(page)]
    assert len(names) == SERVERS_SHOWN == 16
    assert {"server 7", "server 20", "server 33"} <= set(names)
    assert names == sorted(names, key=lambda name: int(name.split()[1]))
    assert "16 of 40 servers" in section_of(page)
    assert "24 are hidden" in section_of(page)


def test_sixteen_servers_are_all_shown(tmp_path):
    step = {}
    for number in range(1, SERVERS_SHOWN + 1):
        step |= server(number)
    found = servers(tmp_path, [step])
    assert most_telling(found) == found
    assert "hidden" not in section_of(page_of(tmp_path, [step]))


def test_the_plot_has_what_was_logged(tmp_path):
    update = {"time/update_weights": 1.5}
    lag, seconds = "RL steps behind training", "seconds of an update"
    page = page_of(tmp_path / "both", [LAG | update | server(1)] * 3)
    assert PLOT in page and lag in page and seconds in page
    assert "responses over several versions <b>25.0%</b>" in page
    page = page_of(tmp_path / "in step", [update | server(1)] * 3)
    assert PLOT in page and lag not in page and seconds in page
    # the embedded engine has its weights at once
    page = page_of(tmp_path / "embedded", [LAG | update] * 3)
    assert PLOT in page and lag in page and seconds not in page
    assert section_of(page) == ""


def test_a_run_without_servers_and_lag_has_neither(tmp_path):
    page = page_of(tmp_path, [{"time/update_weights": 0.001}] * 3)
    assert PLOT not in page
    assert TITLE not in page
