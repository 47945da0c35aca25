"""The part of the report that says what each rollout server did."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_occ.observe.run_data import RunData
from megatron_occ.observe.several import NOTHING, flat_settings
from megatron_occ.observe.text import escape, format_duration, format_number, format_percent

SERVERS_SHOWN = 16
_URLS = "rl.rollout.server.urls"
_METRIC = re.compile(r"server/([1-9][0-9]{0,5})/\w+")
_HEADS = (
    "version",
    "acceptance length",
    "tokens per second",
    "without work",
    "a request takes",
    "requests",
)
_HINT = (
    "Version: optimizer updates in the weights served in the last step. Tokens per second: mean of "
    "the steps in which it answered, over the time in which it had requests. Without work: share "
    "of the time without any. Acceptance length: tokens a trunk pass, in the end."
)


@dataclass(frozen=True)
class Server:
    """What one server did in a run; None where that is not known.

    `version` is that of its last step, `last_step`. `behind` are the updates that it lacks of the
    newest weights, 0 for a server that the run did not have in the end.
    """

    number: int
    name: str
    last_step: int
    version: float | None
    behind: float
    is_gone: bool
    acceptance: float | None
    speed: float | None
    idle: float | None
    seconds: float | None
    requests: float | None


def servers_section(run: RunData) -> str:
    """Return a table with a row for each server; "" for a run without servers."""
    servers = servers_of(run)
    if not servers:
        return ""
    shown = most_telling(servers)
    head = "".join(f"<td>{escape(text)}</td>" for text in _HEADS)
    return (
        f'<div class="card figures">{_hint(len(servers), len(shown))}'
        '<div class="scroll"><table class="metrics servers">'
        f"<thead><tr><th>Server</th>{head}</tr></thead>"
        f"<tbody>{''.join(_row(server) for server in shown)}</tbody></table></div></div>"
    )


def server_numbers(run: RunData) -> list[int]:
    """The numbers of the servers that a run logged, in order."""
    found = (_METRIC.fullmatch(name) for name in run.series.get("rl", {}))
    return sorted({int(match.group(1)) for match in found if match})


def servers_of(run: RunData) -> list[Server]:
    """What each server of a run did, in the order of their numbers."""
    logs = {number: _log(run, number) for number in server_numbers(run)}
    ends = {number: max(chain.from_iterable(log.values())) for number, log in logs.items()}
    # a resumed run may have fewer servers: those it gave up do not lag
    end = max(ends.values(), default=0)
    versions = {number: _last(log.get("version", {})) for number, log in logs.items()}
    present = [v for number, v in versions.items() if v is not None and ends[number] == end]
    newest = max(present, default=0.0)
    urls = flat_settings(run.rl_config).get(_URLS)
    return [_server(number, log, urls, ends[number], end, newest) for number, log in logs.items()]


def most_telling(servers: Sequence[Server]) -> list[Server]:
    """All of a few servers; of many those with old weights, the slowest and the most idle ones."""
    slowest = sorted(servers, key=lambda server: server.speed or 0.0)
    idlest = sorted(servers, key=lambda server: -(server.idle or 0.0))
    late = [server for server in servers if server.behind]
    in_turn = chain.from_iterable(zip(slowest, idlest, strict=True))
    numbers = list(dict.fromkeys(server.number for server in chain(late, in_turn)))
    kept = set(numbers[:SERVERS_SHOWN])
    return [server for server in servers if server.number in kept]


def _log(run: RunData, number: int) -> dict[str, dict[int, float]]:
    """The values of a server's metrics by step."""
    start = f"server/{number}/"
    series = run.series["rl"]
    return {n.removeprefix(start): series[n] for n in series if n.startswith(start)}


def _server(
    number: int,
    log: Mapping[str, Mapping[int, float]],
    urls: object,
    last_step: int,
    end: int,
    newest: float,
) -> Server:
    version, is_gone = _last(log.get("version", {})), last_step < end
    lags = version is not None and not is_gone
    requests = _finite(log.get("requests", {}))
    speeds = _finite(log.get("tokens_per_second", {}))
    # a step without an answer says nothing of the speed
    speeds = {step: speed for step, speed in speeds.items() if requests.get(step, 1.0) > 0}
    return Server(
        number=number,
        name=_name(number, urls),
        last_step=last_step,
        version=version,
        behind=newest - version if lags else 0.0,
        is_gone=is_gone,
        acceptance=_last(log.get("acceptance_length", {})),
        speed=_mean(speeds),
        idle=_mean(_finite(log.get("idle", {}))),
        seconds=_seconds(_finite(log.get("request_seconds", {})), requests),
        requests=sum(requests.values()) if requests else None,
    )


def _name(number: int, urls: object) -> str:
    """The URL of the configuration, which metrics count from 1."""
    if isinstance(urls, list) and number <= len(urls):
        return str(urls[number - 1])
    return f"server {number}"


def _seconds(seconds: Mapping[int, float], requests: Mapping[int, float]) -> float | None:
    """Mean over requests, not over steps: a step with few of them counts little."""
    both = seconds.keys() & requests.keys()
    count = sum(requests[step] for step in both)
    return sum(seconds[step] * requests[step] for step in both) / count if count > 0 else None


def _finite(values: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _mean(values: Mapping[int, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _last(values: Mapping[int, float]) -> float | None:
    known = _finite(values)
    return known[max(known)] if known else None


def _hint(count: int, shown: int) -> str:
    hint = f'<p class="hint">{escape(_HINT)}</p>'
    if shown == count:
        return hint
    left_out = (
        f"{shown} of {count} servers: those with old weights, the slowest and those most without "
        f"work. {count - shown} are hidden; all are in metrics.jsonl."
    )
    return f'{hint}<p class="hint">{escape(left_out)}</p>'


def _row(server: Server) -> str:
    cells = [
        _version(server),
        _text(server.acceptance, format_number),
        _text(server.speed, format_number),
        _text(server.idle, format_percent),
        _text(server.seconds, format_duration),
        _text(server.requests, _whole),
    ]
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr><th>{escape(server.name)}</th>{columns}</tr>"


def _version(server: Server) -> str:
    text = _text(server.version, _whole)
    if server.is_gone:
        return f"<small>until step {server.last_step:,}</small> {text}"
    if server.behind:
        return f'<b class="late">{_whole(server.behind)} behind</b> {text}'
    return text


def _text(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else escape(form(value))


def _whole(value: float) -> str:
    return f"{value:,.0f}"
