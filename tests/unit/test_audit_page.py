"""Text and page of an audit, from its summary alone."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from audit_records import aligned_world

from megatron_occ.audit.page import render_audit, write_audit_page
from megatron_occ.audit.summary import summarize
from megatron_occ.audit.text import audit_text


@pytest.fixture(scope="module")
def summary():
    record = aligned_world(signals=2, shared=0.5, own=0.5).record(samples=20, window=3)
    record["signals"][0]["name"] = "<script>alert(1)</script>"
    record["checkpoint"] = 'runs/"a" & <b>'
    record["groups"][1] = "layer <1>"
    record["samples"][0]["tails"][0]["top"] = 0.9
    return summarize(record)


class Tags(HTMLParser):
    """Counts of the tags, and what is left open."""

    def __init__(self):
        super().__init__()
        self.open, self.counts = [], {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_foreign_text_is_escaped(summary):
    page = render_audit(summary)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<b>" not in page and "layer <1>" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_is_whole_and_has_a_row_and_plots_for_every_signal(summary, tmp_path):
    path = write_audit_page(tmp_path / "audit.html", summary)
    tags = Tags()
    tags.feed(path.read_text("utf-8"))
    assert tags.open == []
    # two metrics and tails: a head and two signals each
    assert tags.counts["tr"] == 3 * 3
    # alignment twice, groups of two signals, proxies of two signals against two
    assert tags.counts["svg"] == 2 + 2 + 4


def test_the_recommendation_and_the_warnings_are_shown(summary):
    page, text = render_audit(summary), audit_text(summary)
    assert len(summary["warnings"]) == 1
    assert "Keep MTP&#x27;s gradient out of the trunk" in page and "is heavy-tailed" in page
    assert text.splitlines()[-1] == summary["recommendation"]["text"]
    assert f"warning: {summary['warnings'][0]}" in text


def test_columns_of_the_text_stand_under_each_other(summary):
    lines = audit_text(summary).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Euclidean metric"))
    table = lines[start : start + 3]
    assert len({len(line) for line in table}) == 1
    end = table[0].index("c cross") + len("c cross")
    c = summary["results"]["euclidean"]["signals"][1]["c_cross"]["value"]
    assert float(table[2][:end].split()[-3]) == pytest.approx(c, rel=0.05)


def test_what_is_not_measurable_is_said(summary):
    changed = {**summary, "results": {**summary["results"]}}
    adam = summary["results"]["adam"]
    signals = [{**signal, "mixture": None, "gain_at": None} for signal in adam["signals"]]
    changed["results"]["adam"] = {"rl": {**adam["rl"], "clear": False}, "signals": signals}
    for shown in (audit_text(changed), render_audit(changed)):
        assert shown.count("not measurable") == 6
        assert shown.count("which is not clear of 0") == 1
