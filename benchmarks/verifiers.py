"""Throughput of the ``math`` verifier: responses a second, with and without hostile ones.

Responses of several hundred characters are scored by one pool, as in a step of RL. In one run, so
that the times can be compared; processes are started and the verifier imported before.

    python benchmarks/verifiers.py [--responses 2048] [--workers 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from megatron_occ.rl.rewards import VerifierPool

FILLER = "We add the two numbers and carry where the sum is ten or more, so x + 12 = 30. "
# answers, each with a reference that it is and one that it isn't
ANSWERS = (
    ("18", "18", "19"),
    ("1,250", "1250", "125"),
    ("\\frac{3}{4}", "0.75", "\\frac{4}{3}"),
    ("2\\sqrt{3}", "\\sqrt{12}", "\\sqrt{13}"),
    ("x^2+2x+1", "(x+1)^2", "(x-1)^2"),
    ("(1, 2)", "(1,2)", "(2,1)"),
    ("\\frac{\\pi}{4}", "0.25\\pi", "\\frac{\\pi}{3}"),
    ("7\\text{ km}", "7", "8"),
)
HOSTILE = (
    "9^{9^{9^{9}}}",
    "1000000!",
    "\\binom{1000000000}{500000000}",
    "(" * 20 + "x+1" + ")" * 20,
    "\\sum_{n=1}^{1000000000} \\frac{1}{n!}",
)


def responses(count: int, hostile: float, seed: int) -> list[tuple[str, str, str]]:
    """Verifier, response and reference of each."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        answer, right, wrong = draw.choice(ANSWERS)
        if draw.random() < hostile:
            answer = draw.choice(HOSTILE)
        form = draw.choice(("\\boxed{%s}", "#### %s", "The answer is $%s$."))
        text = FILLER * draw.randint(2, 12) + form.replace("%s", answer)
        items.append(("math", text, right if draw.random() < 0.5 else wrong))
    return items


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[float, list[float]] = {0.0: [], 0.02: []}
    timeouts = 0
    with VerifierPool(workers=options.workers) as pool:
        pool.score(responses(4 * options.workers, 0.0, 0))
        for round_number in range(options.rounds):
            for hostile, times in seconds.items():
                items = responses(options.responses, hostile, round_number)
                start = time.perf_counter()
                timeouts += sum(result.status == "timeout" for result in pool.score(items))
                times.append(time.perf_counter() - start)
    print(f"{options.responses} responses, {options.workers} workers, {timeouts} timeouts")
    for hostile, times in seconds.items():
        print(f"{hostile:.0%} hostile: {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
