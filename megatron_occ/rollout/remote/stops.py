"""Do servers end responses where the trainer reads a stop string?

Servers look for stop strings in text that they make of tokens themselves. One with another
tokenizer cuts responses anywhere, and no error says so: token ids and log-probs are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_occ.rollout.engine import STOP, EngineError, SamplingSettings
from megatron_occ.rollout.remote.server import Answer


def check_stops(
    answers: Sequence[Answer | None],
    sampling: SamplingSettings,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """Compare where responses end with what their text says.

    A text may be read in more than one way at its edges, so a few differences are told and most
    must agree.

    Args:
        answers: None: unfinished.
        sampling: with the stop strings.
        decode: of the trainer, from token ids to text.

    Returns:
        A line about responses that differ, if there are any.

    Raises:
        EngineError: most of the responses that server or trainer see a stop string in differ.
    """
    if not sampling.stop_strings:
        return []
    seen = [_sides(answer, sampling, decode) for answer in answers if answer is not None]
    either = [pair for pair in seen if any(pair)]
    differ = [pair for pair in either if not all(pair)]
    if not differ:
        return []
    cut = sum(by_server for by_server, _ in differ)
    text = (
        f"{len(differ)} of {len(either)} responses with a stop string end elsewhere than the "
        f"trainer's tokenizer says: {cut} were cut at none of {list(sampling.stop_strings)}, and "
        f"{len(differ) - cut} went on after one"
    )
    if 2 * len(differ) > len(either):
        raise EngineError(
            f"{text}: the servers have another tokenizer: start them with the folder that "
            "`megatron-occ convert export` writes, or stop at ids (rl.rollout.stop_ids)"
        )
    return [text]


def _sides(
    answer: Answer, sampling: SamplingSettings, decode: Callable[[Sequence[int]], str]
) -> tuple[bool, bool]:
    """Whether the server ended a response at a stop string, and whether the text has one."""
    ended = answer.finish_reason == STOP and answer.tokens[-1] not in sampling.stop_ids
    # one that is complete with the last token may have met the limit as well
    text = decode(answer.tokens if ended else answer.tokens[:-1])
    return ended, any(stop in text for stop in sampling.stop_strings)
