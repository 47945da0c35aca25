"""The help text and the committed reference page follow the schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_occ.config import Config, ConfigError, flat_values, help_text, reference_markdown

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), (
        "docs/configuration.md is out of date: write megatron_occ.config.reference_markdown() to it"
    )


def test_help_shows_every_key_once_with_its_default():
    text = help_text()
    values = flat_values(Config())
    assert len(values) > 80
    for key in values:
        assert text.count(f"\n  {key}=") == 1
    assert "  rl.loss.clip_high=0.28 " in text and "[a number > 0 and <= 1,000,000]" in text
    assert "[one of none, ce, policy]" in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 100


def test_help_can_be_limited_to_a_section_or_a_key():
    text = help_text("mtp.head")
    assert text.startswith("mtp.head: training") and "mtp.trunk.signal=" not in text
    assert text.count("\n  mtp.head.") == 5
    assert "mtp.head.signal" in help_text("mtp") and "rl.steps" not in help_text("mtp")
    assert help_text("seed").splitlines()[1].startswith("  seed=0")
    with pytest.raises(ConfigError, match=r"Did you mean mtp\.head"):
        help_text("mtp.heads")


def test_every_key_has_one_line_of_help():
    def walk(cls: type):
        for field in dataclasses.fields(cls):
            yield field
            if dataclasses.is_dataclass(field.default_factory):
                yield from walk(field.default_factory)

    for field in walk(Config):
        assert field.metadata["help"] and "\n" not in field.metadata["help"], field.name
