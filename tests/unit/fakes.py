"""A policy small enough for unit tests: one token of context, K MTP depths, autograd and SGD."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from megatron_occ.data.tokenizers import CharTokenizer
from megatron_occ.losses import soft_cross_entropy, total_variation
from megatron_occ.losses.heads import HeadOutputs, LossReport
from megatron_occ.rl.batch import head_targets
from megatron_occ.rollout import Generation, row_keys, sample_by_race, token_keys
from megatron_occ.rollout.engine import Done
from tests.unit.fake_gradients import FakeGradients
from tests.unit.fake_layouts import FakeLayout

ALPHABET = "abcdefgh."
TOKENIZER = CharTokenizer(ALPHABET)  # pad 0, eos 1, a 2, ..., "." 10
STOP_IDS = (TOKENIZER.eos_id, *TOKENIZER.encode("."))
WIDTH = 5
DISTANCES = {"soft_ce": soft_cross_entropy, "tv": total_variation}


class Bigram(torch.nn.Module):
    """Embedding, trunk matrix, K MTP matrices and an output layer, in double precision."""

    def __init__(self, depths, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape):
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter(values)

        self.embedding = matrix(TOKENIZER.vocab_size, WIDTH)
        self.trunk = matrix(WIDTH, WIDTH)
        self.output = matrix(TOKENIZER.vocab_size, WIDTH)
        self.heads = torch.nn.ParameterList([matrix(WIDTH, WIDTH) for _ in range(depths)])

    def hidden(self, ids):
        """[b, s, h] of the trunk: position t sees token t alone."""
        return torch.tanh(self.embedding[ids] @ self.trunk)

    def mtp_logits(self, ids, hidden, to_trunk, to_head, leaks=False):
        """Logits [b, s, v] of each depth: depth k at t sees depth k - 1 at t and token t + k."""
        keep = (lambda x: x) if to_trunk else torch.Tensor.detach
        state, logits = keep(hidden), []
        for depth, matrix in enumerate(self.heads, start=1):
            ahead = keep(self.embedding)[ids.roll(-depth, dims=1)]
            state = torch.tanh(state @ (matrix if to_head else matrix.detach()) + ahead)
            output = self.output if leaks and to_head else keep(self.output)
            logits.append(state @ output.t())
        return logits


@dataclass
class FakeStep:
    trunk_norm: float
    head_norm: float
    lr: float
    skipped: bool


@dataclass
class FakeMicroBatch:
    ids: torch.Tensor
    payload: Any
    lengths: Any
    passes: tuple
    temperature: float
    distance: str | None
    leaks: bool
    main_head: bool = True


class FakeActor:
    """Implements ``megatron_occ.rl.interfaces.Actor``; keeps what the tests want to look at.

    ``losses`` and ``gradients`` hold one entry for each mini-batch with a backward pass, ``calls``
    the arguments of ``generate``, ``cuts`` the lengths of the rows of every packed micro-batch.
    ``spoil(outputs, payload, forward_only)`` may replace the outputs of the model. In packed
    micro-batches whatever is behind the end of a sequence is not a number.
    """

    sequence_multiple = micro_batch_multiple = 1
    version = 0
    aborted = False

    def __init__(self, depths=2, *, layout=None, lr=0.5, seed=0):
        self.layout = layout or FakeLayout()
        self.num_depths, self.lr = depths, lr
        self.gradient_space = FakeGradients(self)
        self.model, self.reference = Bigram(depths, seed), Bigram(depths, seed)
        self.losses, self.gradients, self.reports, self.calls = [], [], [], []
        self.cuts = []
        self.spoil = lambda outputs, payload, forward_only: outputs

    def update_weights(self, version):
        assert version == self.version

    def abort(self):
        self.aborted = True

    def submit(self, requests, sampling):
        return Done(self.generate(requests, sampling))

    def generate(self, requests, sampling):
        prompts, seeds = self._note_call(requests, sampling)
        length = sampling.max_response_length
        tokens, logprobs = self._draw([p[-1] for p in prompts], seeds, sampling.temperature, length)
        ends = [
            next((i for i, token in enumerate(row, start=1) if token in sampling.stop_ids), None)
            for row in tokens.tolist()
        ]
        return Generation(
            [row[: end or length] for row, end in zip(tokens.tolist(), ends, strict=True)],
            [row[: end or length] for row, end in zip(logprobs.tolist(), ends, strict=True)],
            ["length" if end is None else "stop" for end in ends],
            versions=[[self.version] * (end or length) for end in ends],
        )

    def _note_call(self, requests, sampling):
        prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        self.calls.append({"prompts": prompts, "seeds": seeds, "temperature": sampling.temperature})
        return prompts, seeds

    @torch.no_grad()
    def _draw(self, last, seeds, temperature, length):
        """Tokens and log-probs [n, length]; a token depends on the one before it alone."""
        everything = self.model.hidden(torch.arange(TOKENIZER.vocab_size))
        table = (everything @ self.model.output.t() / temperature).log_softmax(-1)
        keys = token_keys(row_keys(seeds), torch.arange(length))
        tokens = [torch.tensor(last, dtype=torch.long)]
        for step in range(length):
            tokens.append(sample_by_race(table[tokens[-1]], keys[:, step]))
        chain = torch.stack(tokens, dim=1)
        return chain[:, 1:], table[chain[:, :-1], chain[:, 1:]]

    def get_inference_log_probs(
        self, ids, *, parts, lengths, temperature, entropies=False, masks=None, routes=None
    ):
        found = self._log_probs(self.model, ids, parts, lengths, temperature)
        if not entropies:
            return found
        log_probs = _main(self.model, ids, temperature)[1].detach()
        return torch.stack((found, -(log_probs.exp() * log_probs).sum(-1)))

    def keep_reference(self):
        self.reference = copy.deepcopy(self.model)

    def get_init_policy_logprobs(self, ids, *, parts, lengths, temperature, masks=None):
        return self._log_probs(self.reference, ids, parts, lengths, temperature)

    @torch.no_grad()
    def _log_probs(self, model, ids, parts, lengths, temperature):
        assert sorted(row for part in parts for row in part) == list(range(len(ids)))
        logprobs = torch.empty(ids.shape, dtype=torch.float64)
        for part in map(list, parts):
            own = None if lengths is None else [lengths[row] for row in part]
            self._record(own)
            logprobs[part] = _spoil_padding(_main(model, ids[part], temperature)[0], own)
        return logprobs

    def _record(self, lengths):
        if lengths is not None:
            self.cuts.append(list(lengths))

    def micro_batch(
        self,
        ids,
        payload,
        *,
        lengths=None,
        passes,
        temperature=1.0,
        entropy=False,
        distance=None,
        leaks=False,
        states=None,
        main_head=True,
        masks=None,
        routes=None,
        ends=None,
    ):
        assert states is None, "this model keeps none"
        assert lengths is None or (len(lengths) == len(ids) and max(lengths) <= ids.size(1))
        return FakeMicroBatch(
            ids, payload, lengths, passes, temperature, distance, leaks, main_head
        )

    def pop_routing_metrics(self):
        return {}

    def get_gradient(self, micro_batches, loss, *, head=False, counts=False):
        self.model.zero_grad()
        reports = []
        for batch in micro_batches:
            value, report = loss(self.outputs(batch), batch.payload)
            value.backward()
            reports.append(report)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self.layout.all_reduce_data_parallel(parameter.grad)
        return self.gradient_space.take(head), self._reduce(reports)

    def get_loss_and_metrics(self, micro_batches, loss, *, forward_only=False, balanced=True):
        if not forward_only:
            self.model.zero_grad()
        assert len(micro_batches) % self.micro_batch_multiple == 0
        total, reports = 0.0, []
        for batch in micro_batches:
            self._record(batch.lengths)
            with torch.no_grad() if forward_only else nullcontext():
                outputs = self.spoil(self.outputs(batch), batch.payload, forward_only)
                value, report = loss(outputs, batch.payload)
            if not forward_only:
                value.backward()
            total += float(value.detach())
            reports.append(report)
        if not forward_only:
            self.losses.append(total)
            self._reduce_gradients()
        self.reports.append(self._reduce(reports))
        return self.reports[-1]

    def outputs(self, batch):
        """What the model returns for one micro-batch."""
        ids, model = batch.ids, self.model
        logprobs, log_probs, hidden = _main(model, ids, batch.temperature)
        cut = functools.partial(_spoil_padding, lengths=batch.lengths)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        outputs = {"logprobs": cut(logprobs), "entropy": cut(entropy)} if batch.main_head else {}
        outputs.setdefault("logprobs", None)
        if not batch.passes:
            return HeadOutputs(**outputs)
        targets, passes = head_targets(ids, self.num_depths)[1:], []
        for to_trunk, to_head in batch.passes:
            logits = model.mtp_logits(ids, hidden, to_trunk, to_head, batch.leaks)
            scaled = torch.stack(logits) / batch.temperature
            picked = scaled.log_softmax(-1).gather(-1, targets.unsqueeze(-1))
            passes.append(cut(picked.squeeze(-1)))
        depths = range(1, self.num_depths + 1)
        ahead = torch.stack([log_probs.detach().roll(-depth, dims=1) for depth in depths])
        agreement = (scaled.argmax(-1) == ahead.argmax(-1)).float()
        if batch.distance is not None:
            outputs["distance"] = cut(DISTANCES[batch.distance](scaled, ahead))
        return HeadOutputs(**outputs, passes=tuple(passes), agreement=cut(agreement))

    def finish_training_step(self, mix=None):
        if mix is not None:
            mix()
            self.gradients[-1] = {
                name: p.grad.clone()
                for name, p in self.model.named_parameters()
                if p.grad is not None
            }
        self.version += 1
        trunk = [self.model.embedding, self.model.trunk, self.model.output]
        trunk_norm, head_norm = (_norm(group) for group in (trunk, self.model.heads))
        skipped = not torch.isfinite(torch.tensor([trunk_norm, head_norm])).all().item()
        if not skipped:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter -= self.lr * parameter.grad
        return FakeStep(trunk_norm, head_norm, self.lr, skipped)

    def _reduce_gradients(self):
        grads = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.layout.all_reduce_data_parallel(parameter.grad)
                grads[name] = parameter.grad.clone()
        self.gradients.append(grads)

    def _reduce(self, reports):
        reduce = self.layout.all_reduce_data_parallel
        names = reports[0].metrics
        metrics = {n: reduce(sum(r.metrics[n].double() for r in reports)) for n in names}
        maxima = {
            n: reduce(torch.stack([r.maxima[n] for r in reports]).amax(0), maximum=True)
            for n in reports[0].maxima
        }
        if reports[0].calibration is None:
            return LossReport(metrics, maxima=maxima)
        sums = reports[0].calibration
        for report in reports[1:]:
            sums = sums + report.calibration
        return LossReport(metrics, type(sums).from_tensor(reduce(sums.to_tensor())), maxima)


def _main(model, ids, temperature):
    """Log-probs [b, s] of the next token, of all tokens [b, s, v], and hidden states."""
    hidden = model.hidden(ids)
    log_probs = (hidden @ model.output.t() / temperature).log_softmax(-1)
    targets = head_targets(ids, 0)[0]
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), log_probs, hidden


def _spoil_padding(values, lengths):
    """[..., b, s] with NaN behind the end of every packed sequence."""
    if lengths is None:
        return values
    inside = torch.arange(values.size(-1)) < torch.tensor(lengths).unsqueeze(1)
    return torch.where(inside, values, torch.nan)


def _norm(parameters):
    grads = [p.grad.flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(grads).norm()) if grads else 0.0


class ScriptedActor(FakeActor):
    """Answers with ``respond(prompt_text, seed) -> text``; the log-prob of each token is -1."""

    def __init__(self, respond, **arguments):
        super().__init__(**arguments)
        self.respond, self.responses = respond, []

    def generate(self, requests, sampling):
        prompts, seeds = self._note_call(requests, sampling)
        tokens = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = self.respond(TOKENIZER.decode(prompt), seed)
            tokens.append(TOKENIZER.encode(text)[: sampling.max_response_length])
        self.responses += tokens
        logprobs = [[-1.0] * len(row) for row in tokens]
        ends = [row[-1] in sampling.stop_ids for row in tokens]
        reasons = ["stop" if end else "length" for end in ends]
        versions = [[self.version] * len(row) for row in tokens]
        return Generation(tokens, logprobs, reasons, versions=versions)
