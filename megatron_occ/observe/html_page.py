"""What every page has: one file with its style, without scripts, that needs no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_occ.observe.plot import plot_style
from megatron_occ.observe.text import escape

# Model output is shown in pages. It is escaped; this also forbids the browser to run or to
# fetch anything, should one escape ever be missing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html_page(title: str, body: str, style: str = "") -> str:
    """A whole page: `title` is text, `body` HTML, `style` CSS beside that of all pages."""
    css = resources.files("megatron_occ.observe").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title>"
        f"<style>{plot_style()}{css}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def write_page(path: Path, text: str) -> Path:
    """Write a page, whole or not at all; return its path."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def section(title: str, content: str, hint: str = "") -> str:
    """A headed part of a page; "" without content."""
    if not content:
        return ""
    note = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def grid(cards: Sequence[str]) -> str:
    """Cards side by side; "" without any."""
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""
