"""The record of an audit as arrays: inner products of gradients, mini-batch by mini-batch.

A record is a plain dict (json):

    checkpoint, task: text; updates: of RL behind the checkpoint; parameters: of the trunk;
    world_size, seed, window: whole numbers
    signals: [{"name", "depth"}] x S; groups: [name] x G; metrics: ["euclidean", "adam"]
    samples: n times
        round, mini_batch, sequences, tokens
        same: metric -> {"rl": [G], "c": [S][G], "v2": [S][G]}
        cross: metric -> [{"other": earlier sample, "rl", "c", "c_back", "v2": as in same}]
        proxies: {"logprob": [S], "released": [S]}, null where the policy had not moved, or where
            they were not measured
        tails: [{"top", "effective"}] x S

With g_0 the trunk's RL gradient and g_s a signal's with weight 1: rl is `<g_0, g_0>`, c `<g_0,
g_s>`, v2 `<g_s, g_s>`; across, the first factor is of this mini-batch and the second of the other,
c_back the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_occ.audit.statistics import Means


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products in one metric; n mini-batches, N pairs, S signals, G groups of parameters.

    Args:
        rl: [n, G] `<g_0, g_0>` within a mini-batch.
        c: [n, S, G] `<g_0, g_s>` within.
        v2: [n, S, G] `<g_s, g_s>` within.
        cross_rl: [N, G] `<g_0, g_0>` across.
        cross_c: [N, S, G] `<g_0, g_s>` across, mean of both orders.
        cross_v2: [N, S, G] `<g_s, g_s>` across.
        pairs: [N, 2] the two mini-batches of each pair.
    """

    rl: np.ndarray
    c: np.ndarray
    v2: np.ndarray
    cross_rl: np.ndarray
    cross_c: np.ndarray
    cross_v2: np.ndarray
    pairs: np.ndarray

    def means(self, signal: int) -> Means:
        """Means over all groups, columns rl, c, v2 within and rl, c, v2 across."""
        single = np.stack([self.rl, self.c[:, signal], self.v2[:, signal]]).sum(axis=-1)
        paired = [self.cross_rl, self.cross_c[:, signal], self.cross_v2[:, signal]]
        return Means(single.T, np.stack(paired).sum(axis=-1).T, self.pairs)

    def group_means(self) -> Means:
        """Means by group, columns: rl [G], c [S * G], v2 [S * G] within, then across."""
        n, count = len(self.rl), len(self.pairs)
        single = [self.rl, self.c.reshape(n, -1), self.v2.reshape(n, -1)]
        paired = [self.cross_rl, self.cross_c.reshape(count, -1), self.cross_v2.reshape(count, -1)]
        return Means(np.concatenate(single, axis=1), np.concatenate(paired, axis=1), self.pairs)


def read_products(record: dict[str, Any], metric: str) -> Products:
    """The inner products of a record in one of its metrics.

    Raises:
        ValueError: a number is not finite, or there is no pair.
    """
    samples = record["samples"]
    same = [sample["same"][metric] for sample in samples]
    crosses = [(i, cross) for i, s in enumerate(samples) for cross in s["cross"][metric]]
    if not crosses:
        raise ValueError("the record has no pair of mini-batches: measure more than one")
    entries = [cross for _, cross in crosses]
    products = Products(
        rl=_array(same, "rl"),
        c=_array(same, "c"),
        v2=_array(same, "v2"),
        cross_rl=_array(entries, "rl"),
        cross_c=(_array(entries, "c") + _array(entries, "c_back")) / 2,
        cross_v2=_array(entries, "v2"),
        pairs=np.array([(i, cross["other"]) for i, cross in crosses]),
    )
    shape = (len(record["signals"]), len(record["groups"]))
    assert products.c.shape[1:] == products.cross_v2.shape[1:] == shape, "signals, groups"
    return products


def _array(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    array = np.array([entry[key] for entry in entries], dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"an inner product in {key!r} is not finite: leave its mini-batch out")
    return array
