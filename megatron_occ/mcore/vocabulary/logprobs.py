"""Log-probabilities from hidden states over a vocabulary split across tensor-parallel ranks.

Logits exist for one tile of tokens and ids of one head at a time: the forward pass keeps the hidden
states and one normaliser a token, the backward pass computes each tile's logits again. It goes
through the vocabulary once for all heads, so that a block of rows of the weight's gradient, a sum
over heads and tokens, is finished before the next one begins.

Extra memory in bf16: one tile in fp32, one more if an entropy is asked for, one in bf16; a block of
the weight's gradient; the gradient of the hidden states in fp32 until it is summed; some numbers a
token. That is 224 MiB for 4096 tokens of three heads and either 32,000 or 151,936 ids at width
1024, and 297 MiB for 16,384 tokens (``benchmarks/loss_memory.py``).

On a GPU what is done with a tile is one kernel (``fused.py``), which needs no copy of it in fp32. A
tile has four times as many logits there: one in bf16, and one of their gradient.

Matrix products run in the parameters' precision; softmax, and sums over tiles, in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from megatron_occ.mcore.compiling import compiles
from megatron_occ.mcore.vocabulary.head_passes import HeadGradient, local_sums, run_backward
from megatron_occ.mcore.vocabulary.tiles import Tiles, VocabShard, blocks, tile_shape

# logits alive at once, in elements: 64 MiB in fp32; in a fused tile 128 MiB in bf16
CHUNK_LOGITS, FUSED_LOGITS = 2**24, 2**26


@dataclass(frozen=True)
class HeadTokens:
    """What one head is asked.

    Args:
        hidden: [n, h], the same on all tensor-parallel ranks, and passed through Megatron's
            ``copy_to_tensor_model_parallel_region`` (its gradient here is this shard's part).
        targets: [n] token ids.
        entropy: compute entropies.
        top_ids: find the most likely ids.
        masks: [n, m] 1 + the ids that the softmax is over, then 0; 0 alone: all. None: all.
    """

    hidden: Tensor
    targets: Tensor
    entropy: bool = False
    top_ids: bool = False
    masks: Tensor | None = None


@dataclass(frozen=True)
class TokenStatistics:
    """Per token: log-prob of its target; entropy and most likely id if asked for; each [n]."""

    logprobs: Tensor
    entropy: Tensor | None
    top_ids: Tensor | None


def is_fused(device: torch.device) -> bool:
    """Whether tiles have kernels of their own: where reading and writing memory takes the time."""
    return device.type == "cuda" and compiles()


def head_statistics(
    heads: Sequence[HeadTokens], weight: Tensor, shard: VocabShard, temperature: float = 1.0
) -> list[TokenStatistics]:
    """Log-probs of targets, and on request entropies and top ids, of heads with one output layer.

    Heads that train the weight belong in one call: they then make one gradient of it together.

    Args:
        heads: what each head is asked.
        weight: [v_local, h], this rank's rows of the output layer.
        shard: this rank's part of the vocabulary.
        temperature: divides the logits.

    Returns:
        For each head differentiable log-probs (natural logarithm) and entropies (nats), in fp32
        at least, and top-1 ids.
    """
    wanted = [(head.entropy, head.top_ids) for head in heads]
    tensors = [head.hidden for head in heads] + [head.targets for head in heads]
    tensors += [head.masks for head in heads]
    results = _HeadStatistics.apply(weight, wanted, shard, temperature, *tensors)
    return [TokenStatistics(*results[i : i + 3]) for i in range(0, len(results), 3)]


class _HeadStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, wanted, shard, temperature, *tensors):  # noqa: ANN001, ANN002, ANN205
        count = len(wanted)
        heads = [tensors[i::count] for i in range(count)]
        rows = weight[: shard.size]
        tokens = max(hidden.size(0) for hidden in tensors[:count])
        fused = is_fused(weight.device)
        shape = tile_shape(tokens, *rows.shape, FUSED_LOGITS if fused else CHUNK_LOGITS)
        copies = 1 + any(want[0] for want in wanted)
        tiles = Tiles(weight, shape, temperature, copies, fused=fused)
        results, log_zs, entropies = [], [], []
        for head, want in zip(heads, wanted, strict=True):
            sums = local_sums(*head, rows, shard, tiles, want).across(shard)
            log_total = sums.total.log()
            log_zs.append(log_total + sums.maximum)
            entropies.append(log_total - sums.weighted / sums.total if want[0] else None)
            results += [sums.picked - log_zs[-1], entropies[-1], sums.top_ids]
        ctx.save_for_backward(weight, *tensors, *log_zs, *entropies)
        ctx.shard, ctx.temperature, ctx.shape = shard, temperature, shape
        ctx.mark_non_differentiable(*(ids for ids in results[2::3] if ids is not None))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *upstream):  # noqa: ANN001, ANN002, ANN205
        weight, *saved = ctx.saved_tensors
        count = len(saved) // 5
        need_weight, need_hidden = ctx.needs_input_grad[0], ctx.needs_input_grad[4 : 4 + count]
        one_block = ctx.shard.size <= ctx.shape[1]
        heads = [
            HeadGradient.start(saved[i::count], upstream[3 * i : 3 * i + 2], ctx.temperature)
            for i in range(count)
        ]
        for head, needed in zip(heads, need_hidden, strict=True):
            if head is not None and needed:
                head.allocate(one_block, ctx.shard.size)
        used = [head for head in heads if head is not None]
        copies = 1 + any(head.slope is not None for head in used)
        fused = is_fused(weight.device)
        tiles = Tiles(weight, ctx.shape, ctx.temperature, copies, fused=fused)
        grad_weight = run_backward(used, weight, ctx.shard, tiles, need_weight)
        del tiles
        grads = [None if head is None else head.finish() for head in heads]
        return grad_weight, None, None, None, *grads, *[None] * 2 * count


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
        hidden: [n, h] of the MTP depth, as in :class:`HeadTokens`.
        weight: [v_local, h], taken without gradient.
        teacher_hidden: [n, h] of the main head for the same target tokens, taken without gradient.

    Returns:
        [n], differentiable in ``hidden`` alone.
    """
    return _DraftDistance.apply(
        hidden, weight.detach(), teacher_hidden.detach(), kind, shard, temperature
    )


class _DraftDistance(torch.autograd.Function):
    """Tiles are whole rows: no sum over blocks is needed, and no product with the weight twice."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, kind, shard, temperature):  # noqa: ANN001, ANN205
        ctx.save_for_backward(hidden, weight, teacher_hidden)
        ctx.kind, ctx.shard, ctx.temperature = kind, shard, temperature
        weight, tiles = weight[: shard.size], _row_tiles(hidden, weight, shard, temperature)
        distances = []
        for rows in blocks(hidden.size(0), tiles.rows):
            if kind == "soft_ce":
                log_q = tiles.logits(hidden[rows], weight)
                log_q = _log_softmax_(log_q, shard, tiles.memory(log_q.shape, 1))
                p = _softmax_(tiles.logits(teacher_hidden[rows], weight, copy=1), shard)
                distances.append(p.mul_(log_q).sum(-1).neg_())
            else:
                q = _softmax_(tiles.logits(hidden[rows], weight), shard)
                p = _softmax_(tiles.logits(teacher_hidden[rows], weight, copy=1), shard)
                distances.append(p.sub_(q).abs_().sum(-1).div_(2))
        return shard.reduce(torch.cat(distances))

    @staticmethod
    def backward(ctx, grad_distance):  # noqa: ANN001, ANN205
        hidden, weight, teacher_hidden = ctx.saved_tensors
        shard, grad_hidden = ctx.shard, torch.empty_like(hidden)
        weight, tiles = weight[: shard.size], _row_tiles(hidden, weight, shard, ctx.temperature)
        for rows in blocks(hidden.size(0), tiles.rows):
            q = _softmax_(tiles.logits(hidden[rows], weight), shard)
            p = _softmax_(tiles.logits(teacher_hidden[rows], weight, copy=1), shard)
            if ctx.kind == "soft_ce":
                grad = q.sub_(p)
            else:
                # d tv / d logit_j = q_j (s_j - sum_i q_i s_i) / 2 with s = sign(q - p)
                grad = torch.sub(q, p, out=p).sign_().mul_(q)
                mean = shard.reduce(grad.sum(-1, keepdim=True))
                grad.sub_(q.mul_(mean)).div_(2)
            grad.mul_(grad_distance[rows, None] / ctx.temperature)
            torch.mm(tiles.narrowed(grad), weight, out=grad_hidden[rows])
        return grad_hidden, None, None, None, None, None


def _row_tiles(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tiles:
    # by rows with padding: all ranks must reduce equally often, and only they are equally many
    rows = max(1, min(hidden.size(0), CHUNK_LOGITS // weight.size(0)))
    return Tiles(weight, (rows, shard.size), temperature, copies=2)


def _centre_(logits: Tensor, shard: VocabShard) -> Tensor:
    if logits.size(-1):
        maximum = logits.amax(-1, keepdim=True)
    else:
        maximum = logits.new_full((logits.size(0), 1), torch.finfo(logits.dtype).min)
    return logits.sub_(shard.reduce(maximum, ReduceOp.MAX))


def _softmax_(logits: Tensor, shard: VocabShard) -> Tensor:
    exps = _centre_(logits, shard).exp_()
    return exps.div_(shard.reduce(exps.sum(-1, keepdim=True)))


def _log_softmax_(logits: Tensor, shard: VocabShard, spare: Tensor) -> Tensor:
    centred = _centre_(logits, shard)
    total = torch.exp(centred, out=spare).sum(-1, keepdim=True)
    return centred.sub_(shard.reduce(total).log_())
