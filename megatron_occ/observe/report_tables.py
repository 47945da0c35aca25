"""The parts of the report that are not plots: tiles, responses, events, metrics, configuration."""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_occ.observe.jsonl import to_number
from megatron_occ.observe.run_data import (
    RunData,
    accuracy_basis,
    accuracy_change,
    samples_per_second,
)
from megatron_occ.observe.text import (
    escape,
    format_duration,
    format_number,
    format_percent,
    format_points,
)

_STEPS_SHOWN = 4
_SAMPLES_PER_STEP = 4
_LONGEST_TEXT = 4000
_EVENTS_SHOWN = 200


def tiles(run: RunData) -> str:
    """Return the key figures; a figure that the run does not have is left out."""
    found = [
        _accuracy_tile(run),
        _reward_tile(run),
        _agreement_tile(run),
        _steps_tile(run),
        tile("Wall time", format_duration(run.wall_seconds), "first to last line of the log"),
        _speed_tile(run),
    ]
    return f'<div class="tiles">{"".join(found)}</div>'


def samples_section(run: RunData) -> str:
    """Return responses of a few steps from first to last, up to two right and two wrong each."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    return "".join(_step_table(step, by_step[step]) for step in _spread(sorted(by_step)))


def is_correct(sample: dict[str, Any]) -> bool:
    """Whether a sample counts as right: its `correct` field, or else a positive reward."""
    if "correct" in sample:
        return bool(sample["correct"])
    return (to_number(sample.get("reward")) or 0.0) > 0


def events_section(run: RunData) -> str:
    """Return the warnings and interruptions of the run, the last 200 of them."""
    events = [event for event in run.events if event.get("kind") != "finished"]
    rows = "".join(
        f"<li{' class=alert' if event.get('kind') == 'alert' else ''}>"
        f"<span>step {escape(event.get('step'))}</span>{escape(event.get('message', ''))}</li>"
        for event in events[-_EVENTS_SHOWN:]
    )
    hidden = len(events) - _EVENTS_SHOWN
    note = f'<p class="hint">{hidden} earlier ones are in metrics.jsonl.</p>' if hidden > 0 else ""
    return f'{note}<ul class="events">{rows}</ul>' if rows else ""


def metrics_section(run: RunData) -> str:
    """Return a table of every logged metric: first, last, lowest and highest value."""
    rows = "".join(
        _metric_row(phase, name, [y for _, y in run.points(phase, name)])
        for phase in sorted(run.series)
        for name in run.names(phase)
    )
    columns = "<th>Metric</th><td>lines</td><td>first</td><td>last</td><td>lowest</td>"
    return (
        '<div class="scroll"><table class="metrics"><thead><tr>'
        f"{columns}<td>highest</td></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def config_block(text: str) -> str:
    """Return YAML text for display, with the keys set apart."""
    key = re.compile(r"^(\s*(?:- )?)([^\s#:][^:\n]*)(:)(?=\s|$)", re.MULTILINE)
    marked = key.sub(r"\1<b>\2</b>\3", escape(text.rstrip()))
    return f"<pre>{marked}</pre>"


def tile(label: str, value: str, note: str = "", kind: str = "") -> str:
    """A key figure: `value` is HTML, the others are text."""
    return (
        f'<div class="tile {kind}"><span class="label">{escape(label)}</span>'
        f'<span class="value">{value}</span><span class="note">{escape(note)}</span></div>'
    )


def _accuracy_tile(run: RunData) -> str:
    change = accuracy_change(run)
    if change is None:
        return ""
    before, after = change
    first, last = (run.points("validation", run.accuracy_metric)[i][0] for i in (0, -1))
    if first == last:
        return tile("Sampled pass@1", format_percent(after), accuracy_basis(run), "first")
    trend = "up" if after > before else "down" if after < before else "even"
    value = (
        f"{format_percent(before)}<i>→</i>{format_percent(after)}"
        f'<span class="delta {trend}">{format_points(after - before)} points</span>'
    )
    note = f"RL step {first:g} → {last:g}"
    basis = accuracy_basis(run)
    return tile("Sampled pass@1", value, f"{note}; {basis}" if basis else note, "first")


def _reward_tile(run: RunData) -> str:
    level = run.level("rl", "reward/mean")
    if level is None:
        return ""
    note = f"began at {format_number(level.first)}; {level.basis}"
    return tile("Final reward", format_number(level.last), note)


def _agreement_tile(run: RunData) -> str:
    for phase in ("rl", "pretrain"):
        level = run.level(phase, "agreement/mtp_1")
        if level is not None:
            note = f"depth 1 with the main head; began at {format_percent(level.first)}"
            return tile("MTP agreement", format_percent(level.last), note)
    return ""


def _steps_tile(run: RunData) -> str:
    rl, pretrain = run.last_step("rl"), run.last_step("pretrain")
    if rl is None:
        return tile("Pretraining steps", f"{pretrain or 0:,}")
    note = f"after {pretrain:,} pretraining steps" if pretrain is not None else ""
    return tile("RL steps", f"{rl:,}", note)


def _speed_tile(run: RunData) -> str:
    rate = samples_per_second(run)
    if rate is not None:
        return tile("Samples per second", format_number(rate), "during rollout, median")
    tokens = run.level("pretrain", "tokens_per_second")
    if tokens is None:
        return ""
    return tile("Tokens per second", format_number(tokens.last), "training")


def _spread(steps: list[int]) -> list[int]:
    """Pick a few steps evenly from first to last."""
    if len(steps) <= _STEPS_SHOWN:
        return steps
    last = len(steps) - 1
    return [steps[round(i * last / (_STEPS_SHOWN - 1))] for i in range(_STEPS_SHOWN)]


def _step_table(step: int, samples: list[dict[str, Any]]) -> str:
    right = [sample for sample in samples if is_correct(sample)]
    wrong = [sample for sample in samples if not is_correct(sample)]
    half = _SAMPLES_PER_STEP // 2
    shown = right[: max(half, _SAMPLES_PER_STEP - len(wrong))]
    shown += wrong[: _SAMPLES_PER_STEP - len(shown)]
    rows = "".join(_sample_row(sample) for sample in shown)
    return (
        f"<h3>Step {escape(step)}<small>{len(right)} of {len(samples)} logged responses right"
        '</small></h3><table class="samples"><thead><tr><th>Prompt</th><th>Response</th>'
        "<th>Answer</th><th>Reward</th><th>Advantage</th><th>End</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _sample_row(sample: dict[str, Any]) -> str:
    mark, sign = ("right", "✓") if is_correct(sample) else ("wrong", "✗")
    texts = "".join(
        f'<td data-label="{name.capitalize()}"><pre>{_text(sample.get(name, ""))}</pre></td>'
        for name in ("prompt", "response", "answer")
    )
    return (
        f'<tr class="{mark}">{texts}<td class="fact"><b>{sign} {_value(sample, "reward")}</b></td>'
        f'<td class="fact" data-label="Advantage">{_value(sample, "advantage")}</td>'
        f'<td class="fact" data-label="End">{escape(sample.get("finish_reason", ""))}</td></tr>'
    )


def _value(sample: dict[str, Any], name: str) -> str:
    number = to_number(sample.get(name))
    return "" if number is None else f"{number:.3g}".replace("-", "\N{MINUS SIGN}")


def _text(value: Any) -> str:
    text = str(value)
    if len(text) <= _LONGEST_TEXT:
        return escape(text)
    half = _LONGEST_TEXT // 2
    left_out = f"<em> … {len(text) - 2 * half:,} characters left out … </em>"
    return escape(text[:half]) + left_out + escape(text[-half:])


def _metric_row(phase: str, name: str, values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    numbers = (values[0], values[-1], min(finite), max(finite))
    cells = "".join(f"<td>{escape(format_number(value))}</td>" for value in numbers)
    label = f"<i>{escape(phase)}</i> {escape(name)}"
    return f"<tr><th>{label}</th><td>{len(values)}</td>{cells}</tr>"
