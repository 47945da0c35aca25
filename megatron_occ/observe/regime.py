"""What MTP is to send into the trunk in RL, as a run's configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from megatron_occ.observe.jsonl import to_number

_SIGNALS = {"policy": "policy loss", "ce": "cross-entropy"}


@dataclass(frozen=True)
class TrunkRegime:
    """Keys of `mtp.trunk` and what goes with them.

    `kind` is `nothing`, `fixed`, or the estimator of lambda; `why` says what sends nothing. `gate`
    is in standard errors, 0 for none. Of `acts_every` mini-batches MTP acts in one alone.
    """

    kind: str
    why: str = ""
    signal: str = ""
    weight: float = 0.0
    own_head_loss: bool = False
    metric: str = "adam"
    gate: float = 0.0
    acts_every: int = 1

    @property
    def of_what(self) -> str:
        """What a share in the metric of the inner products is a share of."""
        return "update" if self.metric == "adam" else "gradient"


def trunk_regime(config: str) -> TrunkRegime | None:
    """The regime of a `config.yaml`; None if it holds no section `mtp.trunk`."""
    try:
        document = yaml.safe_load(config)
    except yaml.YAMLError:
        return None
    mtp = _section(document, "mtp")
    trunk = _section(mtp, "trunk")
    if not trunk:
        return None
    why = _nothing(document, mtp, trunk)
    if why:
        return TrunkRegime("nothing", why)
    calibrated = trunk.get("coefficient") == "occ"
    exact = _section(trunk, "exact")
    kind = str(trunk.get("estimator", "logprob")) if calibrated else "fixed"
    head = _section(mtp, "head").get("signal")
    return TrunkRegime(
        kind=kind,
        signal=_SIGNALS.get(str(trunk.get("signal")), "loss"),
        weight=_number(trunk, "weight"),
        own_head_loss=head not in ("same_as_trunk", "none", None),
        metric=str(exact.get("metric", "adam")),
        gate=_number(exact, "gate"),
        # a shared loss has the last lambda between measurements
        acts_every=_acts_every(exact) if kind == "exact" and head != "same_as_trunk" else 1,
    )


def _acts_every(exact: dict[str, Any]) -> int:
    return max(1, int(_number(exact, "every")))


def _nothing(document: Any, mtp: dict[str, Any], trunk: dict[str, Any]) -> str:
    """Why nothing reaches the trunk; "" if something does."""
    if mtp.get("num_layers") == 0:
        return "The model has no MTP layers: RL alone trained the trunk"
    if _section(document, "rl").get("train_trunk") is False:
        return "The trunk was frozen (rl.train_trunk=false): nothing moved it"
    if trunk.get("signal") == "none":
        preset = mtp.get("preset")
        who = f"mtp.preset={preset}" if preset else "mtp.trunk.signal=none"
        return f"{who} sends nothing of MTP into the trunk: RL alone trained it"
    if trunk.get("coefficient") == "fixed" and _number(trunk, "weight") == 0:
        return "mtp.trunk.weight=0 sends nothing of MTP into the trunk: RL alone trained it"
    return ""


def _section(document: Any, name: str) -> dict[str, Any]:
    found = document.get(name) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _number(values: dict[str, Any], name: str) -> float:
    number = to_number(values.get(name))
    return 0.0 if number is None else number
