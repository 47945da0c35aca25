"""Generation by Hugging Face transformers, timed: plain, and speculative with the MTP layers.

The configuration is the fastest found that transformers offers on a CPU without compiling: fp32,
inference mode, torch's attention kernel, a KV cache that grows (a preallocated one was slower, see
``static_cache``, and continuous batching, ``generate_batch``, over a hundred times slower), no
logits processor but the temperature, and no padding where all prompts of a batch have one length.

With MTP, transformers takes one prompt at a time and reads the MTP layers from disk for each of
them. Here they are read once and kept, and reading them is outside the timed part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.peer_weights import load_mtp


@dataclass(frozen=True)
class PeerSampling:
    """How responses are drawn.

    Args:
        max_new_tokens: tokens of a response at most, stop token included.
        stop_ids: ids that end a response.
        pad_id: fills up shorter prompts and finished responses.
        temperature: divides the logits; 0 takes the most probable token.
        use_mtp: draft with the MTP layers. Batch size 1 only.
        static_cache: preallocate the KV cache.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    use_mtp: bool = False
    static_cache: bool = False


@dataclass(frozen=True)
class PeerGeneration:
    """Response ids of each prompt, stop token included; seconds, and passes through the trunk."""

    tokens: list[list[int]]
    seconds: float
    passes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all responses, by seconds."""
        return sum(map(len, self.tokens)) / self.seconds


def generate(
    peer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: PeerSampling,
    batch_size: int,
    *,
    lengths: Sequence[int] | None = None,
) -> PeerGeneration:
    """Generate a response for each prompt, ``batch_size`` at a time.

    Args:
        peer: from ``export_peer``. Generation with MTP leaves hooks in it that slow plain
            generation down: give that another copy (``load_peer``).
        prompts: non-empty lists of token ids.
        sampling: how to draw.
        batch_size: prompts at once.
        lengths: tokens of each response, imposed; a batch goes on until its last row is done.

    Raises:
        ValueError: ``use_mtp`` at a batch size other than 1, which transformers does not have.
    """
    if sampling.use_mtp and batch_size != 1:
        raise ValueError("transformers generates with MTP at batch size 1 only: give batch_size=1")
    tokens: list[list[int]] = []
    with mtp_kept(peer) if sampling.use_mtp else contextlib.nullcontext(), _counted(peer) as passes:
        start = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            part = slice(first, first + batch_size)
            limits = None if lengths is None else lengths[part]
            tokens += _generate_batch(peer, prompts[part], sampling, limits)
        seconds = time.perf_counter() - start
    return PeerGeneration(tokens, seconds, len(passes))


@torch.inference_mode()
def _generate_batch(
    peer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: PeerSampling,
    limits: Sequence[int] | None,
) -> list[list[int]]:
    ids, mask = (tensor.to(peer.device) for tensor in pad_left(prompts, sampling.pad_id))
    output = peer.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=generation_config(sampling),
        stopping_criteria=None if limits is None else _at_lengths(limits, ids.size(1)),
    )
    rows = output[:, ids.size(1) :].tolist()
    if limits is not None:
        return [row[:limit] for row, limit in zip(rows, limits, strict=True)]
    return [_up_to_stop(row, sampling.stop_ids) for row in rows]


def _at_lengths(limits: Sequence[int], prompt: int) -> Any:
    """Each row is done at its own length."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    wanted = torch.tensor(limits)

    class AtLengths(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids.size(1) - prompt >= wanted

    return StoppingCriteriaList([AtLengths()])


def generation_config(sampling: PeerSampling) -> Any:
    """The settings as a ``GenerationConfig``: no logits processor that is not asked for."""
    from transformers import GenerationConfig

    is_greedy = sampling.temperature == 0
    drawing = {} if is_greedy else {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not is_greedy,
        # without an id of its own transformers takes those of the checkpoint: one that none has
        eos_token_id=list(sampling.stop_ids) or [-1],
        pad_token_id=sampling.pad_id,
        use_cache=True,
        use_mtp=sampling.use_mtp or None,
        cache_implementation="static" if sampling.static_cache else None,
        **drawing,
    )


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [b, s]; a causal LM goes on from the last column."""
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _up_to_stop(row: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    length = next((i for i, token in enumerate(row, start=1) if token in stop_ids), len(row))
    return row[:length]


@contextlib.contextmanager
def mtp_kept(peer: Any) -> Iterator[None]:
    """Use MTP layers in memory, where transformers reads them from disk for every call."""
    from transformers.modeling_layers import MtpModel

    layers = load_mtp(peer)
    with mock.patch.object(MtpModel, "from_pretrained", return_value=layers):
        yield


@contextlib.contextmanager
def _counted(peer: Any) -> Iterator[list[None]]:
    """List that grows by one entry with every forward pass."""
    passes: list[None] = []
    handle = peer.register_forward_pre_hook(lambda *_call: passes.append(None))
    try:
        yield passes
    finally:
        handle.remove()
