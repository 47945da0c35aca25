"""Exponential averages of noisy numbers, with bias correction and a standard error."""

from __future__ import annotations

import torch
from torch import Tensor


class ExponentialAverage:
    """Average of a sequence of tensors, newer ones weighing more.

    Sample i of n weighs `w_i = (1 - decay) * decay^(n - i)`. The mean divides by the sum of the
    weights, which is Adam's bias correction (arXiv 1412.6980, section 3). The standard error takes
    samples as independent: the weighted variance over `n_eff = (sum w)^2 / sum w^2`, the effective
    number of samples (Kish 1965), with n_eff - 1 in place of n_eff.

    The state is float64 on the CPU.

    Args:
        shape: of a sample.
        decay: in [0, 1]; 1 weighs all samples alike.

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, shape: tuple[int, ...], decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: use a number in [0, 1]")
        self.decay = decay
        self._sums = torch.zeros(2, *shape, dtype=torch.float64)  # of w x and of w x^2
        self._weights = torch.zeros(2, dtype=torch.float64)  # of w and of w^2

    def update(self, sample: Tensor) -> None:
        """Take in a finite sample."""
        keep, new = self.decay, 1.0 if self.decay == 1 else 1.0 - self.decay
        sample = sample.detach().cpu().double()
        self._sums = keep * self._sums + new * torch.stack((sample, sample.square()))
        factors = torch.tensor([keep, keep**2], dtype=torch.float64)
        self._weights = factors * self._weights + torch.tensor([new, new**2], dtype=torch.float64)

    @property
    def count(self) -> float:
        """Effective number of samples; 0 before the first."""
        total, squares = self._weights.tolist()
        return total**2 / squares if squares > 0 else 0.0

    @property
    def mean(self) -> Tensor:
        """Of the samples' shape; zeros before the first."""
        return self._sums[0] / self._weights[0].clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; infinite until there are two samples."""
        count = self.count
        if count < 1 + 1e-9:
            return torch.full_like(self._sums[0], torch.inf)
        variance = (self._sums[1] / self._weights[0] - self.mean.square()).clamp(min=0)
        return (variance / (count - 1)).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and weights; the decay is not part of it."""
        return {"sums": self._sums.clone(), "weights": self._weights.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict` bit for bit.

        Raises:
            ValueError: it is of samples of another shape.
        """
        sums = torch.as_tensor(state["sums"]).detach().cpu().double()
        if sums.shape != self._sums.shape:
            raise ValueError(
                f"average of samples {list(sums.shape[1:])}, expected {list(self._sums.shape[1:])}"
                ": it was saved with other settings of the calibration"
            )
        self._sums = sums.clone()
        self._weights = torch.as_tensor(state["weights"]).detach().cpu().double().clone()
