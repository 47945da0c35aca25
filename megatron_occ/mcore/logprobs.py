"""Log-probabilities from hidden states over a vocabulary split across tensor-parallel ranks.

Logits exist for one chunk of tokens of one head at a time: the forward pass keeps the hidden
states and one normaliser a token, the backward pass computes each chunk's logits again. Matrix
products run in the parameters' precision, softmax and sums in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

# logits alive at once, in elements: 128 MiB in fp32
CHUNK_LOGITS = 2**25


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: ids ``start .. start + size - 1``.

    ``size`` leaves out padding rows that only make the vocabulary divisible.
    """

    start: int
    size: int
    group: ProcessGroup | None = None

    def reduce(self, values: Tensor, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> Tensor:
        """All-reduce over tensor-parallel ranks, in place; returns it."""
        if self.group is not None:
            all_reduce(values, op=operation, group=self.group)
        return values

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Local column of each id, and whether this rank owns it."""
        local = ids - self.start
        owned = (local >= 0) & (local < self.size)
        return torch.where(owned, local, 0), owned


@dataclass(frozen=True)
class TokenStatistics:
    """Per token: log-prob of its target; entropy and most likely id if asked for; each [n]."""

    logprobs: Tensor
    entropy: Tensor | None
    top_ids: Tensor | None


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    top_ids: bool = False,
) -> TokenStatistics:
    """Log-probs of targets, and on request entropies and top ids, from hidden states.

    Args:
        hidden: [n, h], the same on all tensor-parallel ranks, and passed through Megatron's
            ``copy_to_tensor_model_parallel_region`` (its gradient here is this shard's part).
        weight: [v_local, h], this rank's rows of the output layer.
        targets: [n] token ids.
        shard: this rank's part of the vocabulary.
        temperature: divides the logits.
        entropy: compute entropies.
        top_ids: find the most likely ids.

    Returns:
        Differentiable log-probs (natural logarithm) and entropies (nats), and top-1 ids.
    """
    wanted = (entropy, top_ids)
    columns = weight[: shard.size]
    logprobs, *extra = _TokenStatistics.apply(hidden, columns, targets, shard, temperature, wanted)
    found = iter(extra)
    return TokenStatistics(
        logprobs, next(found) if entropy else None, next(found) if top_ids else None
    )


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_LOGITS // max(1, vocabulary))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.t()
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _top_ids(local_top: Tensor, local_max: Tensor, shard: VocabShard) -> Tensor:
    top = local_top + shard.start
    if shard.group is None:
        return top
    maximum = shard.reduce(local_max.clone(), ReduceOp.MAX)
    # the lowest id wins a tie, as argmax does on one rank
    candidate = torch.where(local_max == maximum, top, torch.iinfo(top.dtype).max)
    return shard.reduce(candidate, ReduceOp.MIN)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, shard, temperature, wanted):  # noqa: ANN001, ANN205
        want_entropy, want_top = wanted
        parts = []
        for rows in _chunks(hidden.size(0), weight.size(0)):
            logits = _logits(hidden[rows], weight, temperature)
            local_max, local_top = logits.max(-1) if want_top else (logits.amax(-1), None)
            column, owned = shard.locate(targets[rows])
            picked = torch.where(owned, logits.gather(-1, column[:, None]).squeeze(-1), 0.0)
            maximum = shard.reduce(local_max.clone(), ReduceOp.MAX)
            centred = logits.sub_(maximum[:, None])
            exps = centred.exp() if want_entropy else centred.exp_()
            total = shard.reduce(exps.sum(-1))
            log_z = total.log() + maximum
            part = [log_z, shard.reduce(picked) - log_z]
            if want_entropy:
                part.append(total.log() - shard.reduce(exps.mul_(centred).sum(-1)) / total)
            if want_top:
                part.append(_top_ids(local_top, local_max, shard))
            parts.append(part)
        log_z, logprobs, *extra = (torch.cat(column) for column in zip(*parts, strict=True))
        entropy = extra[0] if want_entropy else None
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        if want_top:
            ctx.mark_non_differentiable(extra[-1])
        ctx.set_materialize_grads(False)
        return logprobs, *extra

    @staticmethod
    def backward(ctx, grad_logprobs, *grad_extra):  # noqa: ANN001, ANN002, ANN205
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        # of the logits before their division by the temperature
        upstream = torch.zeros_like(log_z) if grad_logprobs is None else grad_logprobs
        upstream = upstream / ctx.temperature
        grad_entropy = grad_extra[0] if entropy is not None else None
        if grad_entropy is not None:
            grad_entropy = grad_entropy / ctx.temperature
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        if need_weight:
            # summed over chunks in at least fp32
            dtype = torch.promote_types(weight.dtype, torch.float32)
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            log_probs = _logits(hidden[rows], weight, ctx.temperature).sub_(log_z[rows, None])
            if grad_entropy is None:
                grad = log_probs.exp_().mul_(-upstream[rows, None])
            else:
                # d H / d logit = -p (log p + H)
                grad = log_probs.exp()
                slope = log_probs.add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
                grad.mul_(slope.add_(upstream[rows, None]).neg_())
            # d log p_y / d logit = onehot(y) - p
            column, owned = ctx.shard.locate(targets[rows])
            grad.scatter_add_(-1, column[:, None], (upstream[rows] * owned)[:, None])
            grad = grad.to(weight.dtype)
            if need_hidden:
                grad_hidden[rows] = grad @ weight
            if need_weight:
                grad_weight += grad.t() @ hidden[rows]
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def draft_distance(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    shard: VocabShard,
    temperature: float = 1.0,
) -> Tensor:
    """Distance of the drafter's distribution q to the policy's p, per token.

    Args:
        kind: ``soft_ce`` for -sum p log q, ``tv`` for 0.5 sum |p - q| (1 - tv is the acceptance
            rate of lossless speculative sampling, Leviathan et al. 2211.17192).
        hidden: [n, h] of the MTP depth, as for :func:`token_statistics`.
        weight: [v_local, h], taken without gradient.
        teacher_hidden: [n, h] of the main head for the same target tokens, taken without gradient.

    Returns:
        [n], differentiable in ``hidden`` alone.
    """
    columns = weight[: shard.size].detach()
    return _DraftDistance.apply(hidden, columns, teacher_hidden.detach(), kind, shard, temperature)


class _DraftDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, kind, shard, temperature):  # noqa: ANN001, ANN205
        distances = []
        for rows in _chunks(hidden.size(0), weight.size(0)):
            states = (hidden[rows], teacher_hidden[rows])
            log_q, log_p = (_log_softmax(x, weight, shard, temperature) for x in states)
            terms = (
                -log_p.exp() * log_q if kind == "soft_ce" else (log_p.exp() - log_q.exp()).abs() / 2
            )
            distances.append(shard.reduce(terms.sum(-1)))
        ctx.save_for_backward(hidden, weight, teacher_hidden)
        ctx.kind, ctx.shard, ctx.temperature = kind, shard, temperature
        return torch.cat(distances)

    @staticmethod
    def backward(ctx, grad_distance):  # noqa: ANN001, ANN205
        hidden, weight, teacher_hidden = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        for rows in _chunks(hidden.size(0), weight.size(0)):
            states = (hidden[rows], teacher_hidden[rows])
            q, p = (_log_softmax(x, weight, ctx.shard, ctx.temperature).exp_() for x in states)
            if ctx.kind == "soft_ce":
                grad = q - p
            else:
                # d tv / d logit_j = q_j (s_j - sum_i q_i s_i) / 2 with s = sign(q - p)
                sign = (q - p).sign()
                mean = ctx.shard.reduce((q * sign).sum(-1, keepdim=True))
                grad = q * (sign - mean) / 2
            grad = grad * (grad_distance[rows].unsqueeze(-1) / ctx.temperature)
            grad_hidden[rows] = grad.to(weight.dtype) @ weight
        return grad_hidden, None, None, None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    logits = _logits(hidden, weight, temperature)
    centred = logits.sub_(shard.reduce(logits.amax(-1), ReduceOp.MAX)[:, None])
    return centred.sub_(shard.reduce(centred.exp().sum(-1)).log_()[:, None])
