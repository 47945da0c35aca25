"""A verifier of your own: a function of response and reference answer that returns a number.

The task: repeat the word before the colon, then write a full stop. ``ab:`` wants ``ab.``.

Try the verifier alone, then train with it (a few seconds, from random weights, on a CPU)::

    python examples/own_verifier.py
    megatron-occ rl --config examples/own_verifier.yaml

The configuration names the function: ``data.verifiers: {echo: "examples.own_verifier:echo"}``.
Lines of data with ``"task_name": "echo"`` use it; ``data.verifier`` is for lines without a name.

A verifier reads text that a model wrote: it must treat it as data and never run it. It works in a
process of its own; an exception or more than ``data.verifier_timeout`` seconds scores 0.
A score of 1 or more is a correct response (``pass@k``); ``avg@k`` is the mean score.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

DATA = Path(__file__).parent / "data" / "echo_train.jsonl"


def echo(response: str, answer: str) -> float:
    """Share of positions, over the longer of both texts, at which response and answer agree.

    Partial credit gives the groups of responses a spread from the first step on, while a reward
    of 0 or 1 would be 0 for nearly every response of an untrained model.
    """
    pairs = list(zip_longest(response, answer))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs) if pairs else 0.0


def main() -> None:
    """Score a few responses to the first problem of the data."""
    problem = json.loads(DATA.read_text().splitlines()[0])
    answer = problem["answer"]
    print(f"prompt {problem['prompt']!r}, answer {answer!r}")
    for response in (answer, answer[:-1], "d" + answer[1:], "dddd", ""):
        print(f"  {response!r:8} scores {echo(response, answer):.2f}")


if __name__ == "__main__":
    main()
