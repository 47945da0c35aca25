"""OCC in TRL: ``GRPOTrainer`` on a small transformers model with an MTP head, on the CPU.

    pip install trl==1.16.0 -c constraints.txt
    python examples/occ_in_trl.py

The trunk gets lambda times the MTP head's policy gradient with weights of 1, the head learns by a
cross-entropy of its own. Lambda comes from the gradients themselves, of four parts of the first
mini-batch of a rollout. TRL shuffles the responses of a rollout: parts are cut by prompt, since
responses to one are not independent. It prints the reward, the losses, c / v^2 in Adam's metric
with its standard error, lambda, 0 until c is two of those from 0, and MTP's share of the update.
"""

from __future__ import annotations

import random
import tempfile
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from mtp_head import MTPHead, mtp_logprobs, trunk_parameters
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from megatron_occ.losses import (
    ExactCalibrator,
    ExactSettings,
    adam_denominators,
    masked_sum,
    parts_by_prompt,
    products_of_parts,
    trunk_gradients,
    weighted_policy_loss,
)

LETTERS = "abcdefgh"
LENGTH = 8


class OCCTrainer(GRPOTrainer):
    """GRPO with a joint loss; one process, no gradient accumulation."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        if self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1:
            raise ValueError("gradients of a mini-batch in pieces would have to be added up first")
        if self.args.loss_type != "dapo":
            raise ValueError("losses of parts have to add up: use loss_type='dapo'")
        self.trunk = trunk_parameters(self.model)
        self.calibrator = ExactCalibrator(1, 1, ExactSettings(lambda_plus=1.0, share_cap=0.5))
        self.model.get_decoder().register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state

    def compute_loss(self, model: Any, inputs: dict, *options: Any, **more: Any) -> Tensor:
        if not self.model.training:
            return super().compute_loss(model, inputs, *options, **more)
        # with the weights that sampled; from the second rollout on: Adam's metric needs an update
        step, every = self.state.global_step, self.args.steps_per_generation
        if step and step % (every * self.args.num_iterations) == 0:
            self._calibrate(model, inputs)
        rl_loss, signal, head_loss = losses = self._losses(model, inputs)
        self.losses = [float(loss.detach()) for loss in losses]
        return rl_loss + self.calibrator.current.item() * signal + 0.1 * head_loss

    def _losses(self, model: Any, inputs: dict) -> list[Tensor]:
        """RL's, MTP's that the trunk learns from, and the head's own; those of parts add up."""
        rl_loss = super().compute_loss(model, inputs)
        # what RL's loss is divided by, the same for all parts
        tokens = inputs["num_items_in_batch"] / self.args.steps_per_generation
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = inputs["completion_mask"]
        given = self.model, self.hidden, ids, mask.size(1), self.temperature
        policy, own = (mtp_logprobs(*given, train=part) for part in ("trunk", "head"))
        signal = weighted_policy_loss(
            policy, policy, inputs["advantages"], mask, ratio_cap=None, normalizer=tokens
        )
        return [rl_loss, signal, -masked_sum(own, mask) / tokens]

    def _calibrate(self, model: Any, inputs: dict) -> None:
        parts = []
        for rows in parts_by_prompt(inputs["prompt_ids"], 4):
            part = {k: v[rows] if torch.is_tensor(v) and v.dim() else v for k, v in inputs.items()}
            parts.append(trunk_gradients(self._losses(model, part)[:2], self.trunk))
        found = products_of_parts(parts, denominators=adam_denominators(self.optimizer, self.trunk))
        if found.is_finite:
            self.found = self.calibrator.update(found)

    def log(self, logs: dict, *options: Any) -> None:
        super().log(logs, *options)
        if "reward" in logs:
            (main, policy, head), found = self.losses, self.found
            print(
                f"update {self.state.global_step:3}  reward {logs['reward']:.3f}  "
                f"losses: RL {main:+.3f} MTP policy {policy:+.3f} head {head:.3f}  "
                f"c/v2 {found.raw.item():+.3f} +- {found.error.item():.3f}  "
                f"lambda {found.values.item():.3f}  share {found.share.item():.1%}"
            )


def tiny_model() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Two random layers with an MTP head, and a tokenizer of single letters."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Qwen2Config(vocab_size=len(vocabulary), **sizes, **heads, **tokens)
    model = Qwen2ForCausalLM(config)
    model.mtp = MTPHead(config.hidden_size)
    return model, tokenizer


def alphabet(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of letters that follow the one before in the alphabet, in a circle."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = prompt[-1] + completion
        right = [LETTERS.find(b) == (LETTERS.find(a) + 1) % len(LETTERS) for a, b in pairwise(text)]
        scores.append(sum(right) / LENGTH)
    return scores


def main(rollouts: int = 40, updates: int = 4) -> None:
    torch.manual_seed(0)
    model, tokenizer = tiny_model()
    draw = random.Random(0)
    prompts = ["".join(draw.choices(LETTERS, k=3)) for _ in range(16 * rollouts)]
    data = Dataset.from_dict({"prompt": prompts})
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,
            num_generations=8,
            per_device_train_batch_size=128 // updates,
            steps_per_generation=updates,
            max_steps=rollouts * updates,
            max_completion_length=LENGTH,
            loss_type="dapo",
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            # one norm for trunk and head would let the head shrink the policy's update
            max_grad_norm=0.0,
            logging_steps=5 * updates,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = OCCTrainer(
            model, alphabet, arguments, train_dataset=data, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
