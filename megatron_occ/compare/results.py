"""``results.json``: what a study found, small enough to commit, and all that its page needs."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_occ.compare.runs import RunSpec
from megatron_occ.compare.study import Study, differences
from megatron_occ.config import to_yaml
from megatron_occ.observe.jsonl import json_safe
from megatron_occ.observe.plot_scale import Point, bucket_means
from megatron_occ.observe.run_data import RunData, load_run, seconds_per_step

RESULTS_FILE = "results.json"
FORMAT = 1
# metrics of RL steps whose course the page shows, beside lambda
CURVES = ("reward/mean", "entropy", "draft/acceptance_length", "agreement/mtp_1", "grad_norm/trunk")
_CURVE_POINTS = 40
_DIGITS = 6
# what an arm's runs differ in anyway
_OWN = ("run_dir", "seed", "keep_checkpoints", "rl.init_from", "mtp.preset")


def collect(study: Study, runs: Iterable[RunSpec], start: str) -> dict[str, Any]:
    """What a study's run folders hold; runs that have not begun are left out.

    Args:
        start: the checkpoint of all runs, in words.
    """
    reference = study.config(study.reference)
    return {
        "format": FORMAT,
        "name": study.name,
        "reference": study.reference,
        "seeds": list(study.seeds),
        "steps": reference.rl.steps,
        "start": start,
        "base": [path.name for path in study.base],
        "overrides": list(study.overrides),
        "arms": {
            arm: {
                "overrides": list(overrides),
                "differs": differences(reference, study.config(arm), _OWN),
            }
            for arm, overrides in study.arms.items()
        },
        "config": to_yaml(reference),
        "runs": [_summary(run) for run in runs if run.state != "missing"],
    }


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write the file with a line for each run, so that a change shows as one."""
    head = {name: value for name, value in results.items() if name != "runs"}
    lines = [f"{json.dumps(name)}: {_compact(value)}" for name, value in head.items()]
    runs = ",\n".join(_compact(run) for run in results["runs"])
    text = "{" + ",\n".join([*lines, f'"runs": [\n{runs}\n]']) + "}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_results(path: Path) -> dict[str, Any]:
    """What ``write_results`` wrote.

    Raises:
        ValueError: the file is missing, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}: name the results.json of a study") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: name the results.json of a study") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not _is_whole(found):
        raise ValueError(
            f"{path}: not results of format {FORMAT} of `megatron-occ compare`: write them again "
            "from the run folders, with the study file and --report"
        )
    return found


def _is_whole(found: dict[str, Any]) -> bool:
    """Whether the parts that a page reads are there."""
    head = {"name": str, "reference": str, "seeds": list, "arms": dict, "config": str, "runs": list}
    if not all(isinstance(found.get(name), kind) for name, kind in head.items()):
        return False
    arms, runs = found["arms"], found["runs"]
    return (
        found["reference"] in arms
        and all(
            isinstance(arm, dict) and {"overrides", "differs"} <= set(arm) for arm in arms.values()
        )
        and all(isinstance(run, dict) and {"arm", "seed", "finished"} <= set(run) for run in runs)
    )


def _compact(value: Any) -> str:
    return json.dumps(json_safe(value), allow_nan=False, ensure_ascii=False)


def _summary(run: RunSpec) -> dict[str, Any]:
    try:
        data = load_run(run.folder)
    except ValueError:
        # it has begun, and logged nothing yet
        return {"arm": run.arm, "seed": run.seed, "finished": False, "validation": {}}
    last = data.last_step("rl") or 0
    return {
        "arm": run.arm,
        "seed": run.seed,
        "finished": run.state == "finished",
        "steps": last,
        "first_rollouts": _first_rollouts(data),
        "seconds_per_step": _round(seconds_per_step(data)),
        "validation": _validation(data),
        "means": {
            name: [_round(_mean(data.points("rl", name), after)) for after in (0, 0.75 * last)]
            for name in data.names("rl")
            if not name.startswith("time/")
        },
        "curves": {
            name: _curve(data.points("rl", name))
            for name in data.names("rl")
            if name in CURVES or name.startswith("lambda/")
        },
    }


def _validation(data: RunData) -> dict[str, list[float]]:
    """Steps, and each metric's value at them."""
    steps = sorted(
        {step for values in data.series.get("validation", {}).values() for step in values}
    )
    found: dict[str, list[float]] = {"step": steps} if steps else {}
    for name in data.names("validation"):
        values = data.series["validation"][name]
        found[name] = [_round(values.get(step, math.nan)) for step in steps]
    return found


def _curve(points: list[Point]) -> list[list[float]]:
    """[steps, values], averaged over stretches of equal length."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    shown = bucket_means(finite, _CURVE_POINTS) if finite else []
    return [[_round(x) for x, _ in shown], [_round(y) for _, y in shown]]


def _mean(points: list[Point], after: float) -> float:
    values = [y for x, y in points if x > after and math.isfinite(y)]
    return sum(values) / len(values) if values else math.nan


def _first_rollouts(data: RunData) -> str:
    """Fingerprint of the first step's responses: equal for all arms of a seed, if paired."""
    texts = [[s.get("prompt"), s.get("response")] for s in data.samples if s["step"] == 1]
    means = [
        _round(data.series.get("rl", {}).get(name, {}).get(1, math.nan))
        for name in ("reward/mean", "rollout/length_mean")
    ]
    return hashlib.sha256(_compact([texts, means]).encode()).hexdigest()[:12]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
