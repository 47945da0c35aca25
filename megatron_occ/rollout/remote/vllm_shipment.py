"""A shipment of weights, as vLLM's worker extension is asked to take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_occ.rollout.remote.carriers import Shipment, Weights
from megatron_occ.rollout.remote.checks import Field
from megatron_occ.rollout.remote.http import TransportError

# posts a body to /collective_rpc, and gives what each worker answered
Ask = Callable[[dict[str, Any]], list[Field]]


def deliver(ask: Ask, url: str, shipment: Shipment, *, drafting: bool) -> tuple[int, ...]:
    """Have all workers of a server fetch a shipment and load it.

    Args:
        ask: see ``Ask``.
        url: of the server.
        shipment: its weights.
        drafting: the server has a drafter.

    Returns:
        A fingerprint of the drafter of each worker; empty without one.

    Raises:
        TransportError: it did not get them; what it holds then is not to be used.
    """
    source = json.dumps(shipment.source_for(url))
    answers = ask(
        {"method": "fetch_weights", "kwargs": {"manifest": shipment.text, "source": source}}
    )
    for answer in answers:
        if answer["identity"].text() != shipment.identity:
            raise TransportError(f"{url}: holds other weights than those that were sent", True)
        answer["trunk"].integer(1)
        if drafting:
            answer["drafter"].integer(1)
    return tuple(answer["held"].integer() for answer in answers) if drafting else ()


def holds(ask: Ask, weights: Weights) -> bool:
    """Whether all workers of a server have loaded these as the last thing, to their end.

    A folder is known by its path, which no two versions of a run share.
    """
    wanted = weights.identity if isinstance(weights, Shipment) else str(weights)
    answers = ask({"method": "held_weights", "kwargs": {}})
    return all(answer["identity"].text() == wanted for answer in answers)
