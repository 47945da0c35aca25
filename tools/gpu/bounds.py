"""Every number that something is compared with: a wrong number fails, a missed aim is told."""

from __future__ import annotations

from dataclasses import dataclass

# largest deviation of a loss, of lambda, or of an entry of a gradient by the tensor's largest one:
# fp32 on two devices
DEVIATION = 1e-4
# log-probs of the engine against the training forward pass in fp32, in nats
ENGINE_GAP = 1e-4
# the same as RL logs it, mean and largest of a token, by precision. The largest of a small model
# says little: a CPU's bf16 is up to 2 nats off its fp32 in 2,000 responses of one, 0.003 on average
LOGPROB_GAP = {"bf16": (0.03, 4.0), "fp8": (0.15, 4.0)}
# rewards of two runs of the same prompts: standard errors of the mean difference, and what is
# always allowed
REWARD_ERRORS, REWARD_SLACK = 3.0, 0.05
# bytes of weights, gradients and optimizer: parameters are counted exactly, buffers are padded
LIVE = 0.02


@dataclass(frozen=True)
class Aim:
    """A bound that a measurement should keep.

    Args:
        bound: the value.
        is_most: it is an upper bound; else a lower one.
        unit: behind the numbers.
    """

    bound: float
    is_most: bool = False
    unit: str = "x"


# of one H100
AIMS = {
    "utilisation": Aim(0.40, unit=" of the matrix ceiling"),
    "plain_pytorch": Aim(1.0, unit="x plain PyTorch"),
    "fp8": Aim(1.2, unit="x bf16"),
    "occ_over_detach": Aim(1.1, is_most=True, unit="x the time of detach"),
    "generate": Aim(3.0, unit="x generate"),
    "floor": Aim(2.5, is_most=True, unit="x the memory floor"),
    "drafts": Aim(1.4, unit="x no drafts"),
    "estimate": Aim(0.10, is_most=True, unit=" off the estimate"),
}
# seconds that a section may take, the most valuable first
LIMITS = {
    "environment": 40,
    "correct": 130,
    "runs": 150,
    "training": 100,
    "rollouts": 95,
    "memory": 20,
}
# sections that go at once: neither of them is timed
TOGETHER = ("correct", "runs")
# of each section of a rehearsal: a busy machine may be slow, and only what hangs is to be cut
REHEARSAL_LIMIT = 600
SECTIONS = tuple(LIMITS)
