"""From log-probs to tokens: cuts, and two ways to draw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_occ.rollout.engine import SamplingSettings
from megatron_occ.rollout.noise import uniforms, uniforms_at


def token_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs of all tokens under softmax(logits / temperature), temperature 0 as 1.

    Args:
        logits: [..., v] fp32.
    """
    return (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)


@dataclass(frozen=True)
class Kept:
    """A distribution over the tokens that cuts left.

    Args:
        log_probs: [..., c] normalised; -inf: never drawn.
        ids: [..., c] of them; None: c is the vocabulary, in its order.
        complete: [...] whether no token is missing; None: none ever is.
    """

    log_probs: Tensor
    ids: Tensor | None = None
    complete: Tensor | None = None

    def dense(self, vocabulary: int) -> Tensor:
        """[..., vocabulary] log-probs."""
        if self.ids is None:
            return self.log_probs
        size = (*self.ids.shape[:-1], vocabulary)
        empty = self.log_probs.new_full(size, -torch.inf)
        return empty.scatter_(-1, self.ids, self.log_probs)

    def of(self, tokens: Tensor) -> Tensor:
        """[n] log-probs of tokens [n]; -inf for one that was cut."""
        if self.ids is None:
            return self.log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        others = self.ids != tokens.unsqueeze(-1)
        return self.log_probs.masked_fill(others, -torch.inf).amax(-1)

    def mask(self, at_most: int) -> Tensor:
        """[..., m] int32, 1 + the ids that are left, the likeliest first, then 0; 0 alone: all.

        Args:
            at_most: ids that are left, or more; m is the vocabulary where that is less.
        """
        if self.ids is None:
            size = (*self.log_probs.shape[:-1], min(at_most, self.log_probs.size(-1)))
            return self.log_probs.new_zeros(size, dtype=torch.int32)
        left = (self.ids + 1).masked_fill(self.log_probs == -torch.inf, 0)
        return left[..., :at_most].int()

    def race(self, keys: Tensor) -> Tensor:
        """[n] ids, see :func:`sample_by_race`."""
        return sample_by_race(self.log_probs, keys, self.ids)


def cut(log_probs: Tensor, settings: SamplingSettings, *, at_most: int | None = None) -> Kept:
    """The distribution that tokens are drawn from: cut by top-k, then by top-p, and normalised.

    A token stays under top-p if the tokens likelier than it hold less than ``top_p`` of the mass
    that top-k left (Holtzman et al. 2020, 1904.09751); the likeliest one always stays. Of equally
    likely tokens those with the smaller ids come first.

    Args:
        log_probs: [..., v] normalised; returned as they are where nothing is cut.
        settings: have the cuts.
        at_most: tokens that top-p alone looks at, the likeliest ones, which is many times as fast
            as a look at all; where the nucleus is larger the row is not ``complete``. None: all.
    """
    vocabulary = log_probs.size(-1)
    cuts_k = settings.top_k is not None and settings.top_k < vocabulary
    if cuts_k:
        likeliest, ids = log_probs.topk(settings.top_k, dim=-1)
        if settings.top_p >= 1:
            return Kept(likeliest.log_softmax(-1), ids)
        return _nucleus(likeliest, ids, likeliest, settings.top_p)
    if settings.top_p >= 1:
        return Kept(log_probs)
    if at_most is None or at_most >= vocabulary:
        likeliest, ids = log_probs.sort(dim=-1, descending=True, stable=True)
        return _nucleus(likeliest, ids, log_probs, settings.top_p)
    ids = log_probs.topk(at_most, dim=-1, sorted=False).indices.sort(dim=-1).values
    likeliest, order = log_probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    kept = _nucleus(likeliest, ids.gather(-1, order), log_probs, settings.top_p)
    # others as likely as the last one may be missing: it must not be needed
    return replace(kept, complete=kept.log_probs[..., -1] == -torch.inf)


def _nucleus(likeliest: Tensor, ids: Tensor, whole: Tensor, top_p: float) -> Kept:
    """Cut by top-p.

    Args:
        likeliest: [..., c] log-probs, the largest first.
        ids: [..., c] of them.
        whole: [..., v] log-probs of all tokens that have mass.
        top_p: the share of that mass that stays.
    """
    largest = likeliest[..., :1].double()
    shares = likeliest.double() - largest
    weights = shares.exp()
    total = whole.double().sub_(largest).exp_().sum(-1, keepdim=True)
    mass = weights.cumsum(-1)
    stays = mass - weights < top_p * total
    stays[..., 0] = True
    held = mass.gather(-1, stays.sum(-1, keepdim=True) - 1)
    shares.sub_(held.log()).masked_fill_(~stays, -torch.inf)
    return Kept(shares.to(likeliest), ids)


def cut_log_probs(log_probs: Tensor, settings: SamplingSettings) -> Tensor:
    """As :func:`cut`, [..., v] with -inf for what was cut."""
    return cut(log_probs, settings).dense(log_probs.size(-1))


def sample_by_race(log_probs: Tensor, keys: Tensor, ids: Tensor | None = None) -> Tensor:
    """Sampling by an exponential race: id i arrives after a time Exp(p_i), and the first one wins.

    This is the Gumbel-max trick (Maddison, Tarlow and Minka 2014, 1411.0030) without logarithms of
    the times. Two distributions whose races have the same random numbers draw the same token with a
    probability of at least (1 - TV) / (1 + TV), whatever the vocabulary (Daliri et al. 2024,
    2408.07978), and rounding changes a draw only where two ids arrive together.

    Args:
        log_probs: [n, v] normalised; -inf never arrives.
        keys: [n] of the tokens, see ``noise.token_keys``.
        ids: [n, v] where these are not all ids in their order.

    Returns:
        [n] ids; id i is drawn with probability exp(log_probs[i]).
    """
    numbers = uniforms(keys, log_probs.size(-1)) if ids is None else uniforms_at(keys, ids)
    times = numbers.neg_().log1p_().neg_()
    first = times.div_(log_probs.double().exp()).argmin(-1)
    return first if ids is None else ids.gather(-1, first.unsqueeze(-1)).squeeze(-1)


def sample_from_uniform(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling.

    Args:
        log_probs: [n, v] normalised log-probs.
        uniform: [n] in [0, 1).

    Returns:
        [n] ids; id i is drawn with probability exp(log_probs[i]).
    """
    return sample_from_weights(log_probs.double().exp(), uniform)


def sample_from_weights(weights: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`sample_from_uniform`; id i is drawn in proportion to ``weights[i]`` >= 0, fp64."""
    cumulative = weights.cumsum(-1)
    # rounding may leave the last value below 1: scale, so that it is reachable and never passed
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    return ids.clamp_(max=weights.size(1) - 1)
