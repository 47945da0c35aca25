"""Numbers, durations and foreign text in the form in which a person reads them."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

# Control characters are invisible or not allowed in XML; show them as their Unicode pictures.
_CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MINUS = "\N{MINUS SIGN}"  # as wide as a plus sign, unlike the hyphen


def escape(text: object) -> str:
    """Return any text, model output included, safe to place in HTML or SVG (attributes too)."""
    printable = str(text).translate(_CONTROL).encode("utf-8", "replace").decode("utf-8")
    return html.escape(printable, quote=True)


def format_number(value: float, digits: int = 3) -> str:
    """Format with `digits` significant digits: 0.512, 12.3, 1,234, 45.6k, 1.0e-6."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    for scale, suffix in _SUFFIXES if size >= 1e4 else ():
        if size >= scale:
            return _fixed(value / scale, digits) + suffix
    if size < 1e-3:
        return _short_exponent(f"{value:.{digits - 2}e}")
    return _fixed(value, digits)


def tick_formatter(ticks: Sequence[float], percent: bool = False) -> Callable[[float], str]:
    """Return a format for tick labels with just as many decimals as tell neighbours apart."""
    step = (ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    largest = max(abs(tick) for tick in ticks)
    if largest < 1e-3 and not percent:
        return lambda value: _short_exponent(f"{value:.2g}")
    scale, suffix = (0.01, "%") if percent else (1.0, "")
    if largest >= 1e4 and not percent:
        scale, suffix = next(pair for pair in _SUFFIXES if largest >= pair[0])
    decimals = max(0, -math.floor(math.log10(step / scale) + 1e-9))

    def label(value: float) -> str:
        text = f"{value / scale:,.{decimals}f}".replace("-", _MINUS)
        return "0" if value == 0 and suffix not in ("", "%") else text + suffix

    return label


def format_percent(value: float) -> str:
    """Format a fraction: 0.4123 gives "41.2%"."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else str(value)


def format_points(difference: float) -> str:
    """Format the difference of two fractions in percentage points: 0.267 gives "+26.7"."""
    return f"{100 * difference:+.1f}".replace("-", _MINUS) if math.isfinite(difference) else "nan"


def format_duration(seconds: float) -> str:
    """Format seconds with the two largest units: "8.2 s", "3 min 24 s", "2 h 14 min", "3 d 4 h"."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, unit, sub in ((86400, 3600, "d", "h"), (3600, 60, "h", "min")):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {sub}"
    return f"{whole // 60} min {whole % 60} s"


def _fixed(value: float, digits: int) -> str:
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def _short_exponent(text: str) -> str:
    return text.replace("e-0", "e-").replace("e+0", "e+")
