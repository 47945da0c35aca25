"""How many threads torch's kernels use on a CPU: by the size of the model and by what is free.

Threads of one kernel wait for each other, spinning: where another process takes the processor of
one of them, all stand still for its time slice, thousands of times a step. One thread fewer is then
several times faster than as many as there are processors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from megatron_occ.config.schema import Config
from megatron_occ.mcore.cpu.load import Sample, cores, others_cores

logger = logging.getLogger(__name__)

# multiply-adds of the widest product of a micro-batch that are worth a thread (measured: below,
# starting the threads costs more than they save)
GRAIN = 4_000_000
# shorter spans say little: the system counts in hundredths of a second
_SHORTEST = 1.0  # seconds
# steps in a row with more processors free before threads are added again
_CALM = 3


class Threads:
    """Sets the number at the start, and again at each step where other processes come or go.

    ``OMP_NUM_THREADS`` wins: nothing is changed then. Nor is it where several processes share the
    work, which take their share of the processors once.

    Args:
        most: threads that the work is worth.
        available: processors that this process may use.
        adapts: follow the load of the machine.
        sample: of processor time; None where the system does not tell.
    """

    def __init__(
        self,
        most: int,
        available: int,
        *,
        adapts: bool,
        sample: Callable[[], Sample | None] = Sample.now,
    ) -> None:
        self.available, self._most, self._sample = available, most, sample
        self.number = most
        self._calm = 0
        self._before = sample() if adapts and most > 1 else None

    def follow(self) -> str | None:
        """Set the number for the next step; returns a sentence where it changed.

        Called by the thread that computes: the number is one of each thread.
        """
        if self._before is None:
            return None
        now = self._sample()
        if now is None or now.time - self._before.time < _SHORTEST:
            return None
        others = others_cores(self._before, now)
        self._before = now
        wanted = max(1, min(self._most, int(self.available - others + 0.5)))
        self._calm = self._calm + 1 if wanted > self.number else 0
        if wanted == self.number or (wanted > self.number and self._calm < _CALM):
            return None
        self.number, self._calm = wanted, 0
        torch.set_num_threads(wanted)
        return (
            f"{_counted(wanted)} from here: other processes keep {others:.1f} of "
            f"{self.available} processors busy (OMP_NUM_THREADS={wanted} would keep the number, "
            "and with it the last bits of all results)"
        )


def choose_threads(config: Config, *, world_size: int) -> Threads:
    """Those of this process, set and told in one line on the log.

    Args:
        config: sizes of the model and of a micro-batch.
        world_size: of the run; ranks on one machine share its processors.
    """
    available = cores()
    if "OMP_NUM_THREADS" in os.environ or torch.cuda.is_available():
        return Threads(torch.get_num_threads(), available, adapts=False)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    share = max(1, min(available, torch.get_num_threads()) // here)
    number = max(1, min(share, products(config) // GRAIN))
    torch.set_num_threads(number)
    logger.info("%s on %d processors; OMP_NUM_THREADS sets it", _counted(number), available)
    return Threads(number, available, adapts=here == 1)


def products(config: Config) -> int:
    """Multiply-adds of the widest matrix product of a training micro-batch, about."""
    model, pretraining, rl = config.model, config.pretrain, config.rl
    widest = max(model.ffn_hidden_size or 0, 4 * model.hidden_size)
    tokens = max(
        pretraining.micro_batch_size * pretraining.sequence_length,
        rl.micro_batch_size * rl.rollout.max_response_length,
    )
    return tokens * model.hidden_size * widest


def _counted(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"
