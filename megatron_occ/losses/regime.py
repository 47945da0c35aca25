"""What MTP does in RL, and the settings of the policy loss, as the joint loss reads them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_occ.losses.objectives import Clipped, Objective


@dataclass(frozen=True)
class PolicySettings:
    """Settings of the policy loss; the MTP heads share the aggregation and the clip range."""

    objective: Objective = field(default_factory=Clipped)
    aggregation: str = "token"
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_kind: str = "k3"
    kl_importance: bool = False
    kl_input_clamp: float | None = 20.0
    kl_output_clamp: float | None = 10.0

    def clipped_for_heads(self, dual_clip: float | None) -> Clipped:
        """The clipped objective of an MTP head, whose dual clip is its own.

        DAPO's range where this objective has none.
        """
        own = self.objective if isinstance(self.objective, Clipped) else Clipped()
        return replace(own, dual=dual_clip)


@dataclass(frozen=True)
class Regime:
    """What MTP sends into the trunk, and what trains the MTP head.

    Args:
        trunk: loss whose gradient enters the trunk: ``none``, ``ce`` or ``policy``.
        head: ``same_as_trunk`` (one graph, one loss), ``none`` (frozen), or a loss of its own that
            is cut off from the trunk: ``ce``, ``soft_ce``, ``tv``, ``policy``.
        trunk_weight: weight of the trunk loss, averaged over depths; None: the coefficients given
            to the loss (OCC).
        head_weight: weight of the head's own loss, averaged over depths.
        weighting: of the tokens in a policy loss of an MTP depth: ``ppo`` (the clipped ratio),
            ``truncated`` (a capped ratio that carries no gradient) or ``unit``.
        dual_clip: of ``ppo``, see ``clipped_policy_loss``.
        ratio_cap: of ``truncated``.
        estimator: ``logprob``, ``released`` or ``exact`` (used with ``trunk_weight=None``).
        lambda_plus: scale of the released formula, the f of the released code.
        clamp: bounds of the released formula's coefficient (the calibrator bounds the paper's).
        leaks: the head's own loss trains the output layer, as in the code released with OCC.
        head_on_rollouts: the head's own loss, ``soft_ce`` or ``tv``, is taken on trunk states that
            rollouts left, see ``HeadLoss``; the joint loss leaves it out.
    """

    trunk: str = "none"
    head: str = "ce"
    trunk_weight: float | None = 0.1
    head_weight: float = 0.1
    weighting: str = "ppo"
    dual_clip: float | None = 10.0
    ratio_cap: float = 1.0
    estimator: str = "logprob"
    lambda_plus: float | None = 1.0
    clamp: tuple[float | None, float | None] = (None, None)
    leaks: bool = False
    head_on_rollouts: bool = False

    @property
    def has_own_loss(self) -> bool:
        """Whether a loss of its own trains the head."""
        return self.head not in ("none", "same_as_trunk")

    @property
    def trains_head(self) -> bool:
        """Whether any gradient reaches the MTP head's own parameters."""
        return self.head_on_rollouts or any(to_head for _, to_head in self.passes)

    @property
    def distance(self) -> str | None:
        """Distance of the head to the main head that the joint loss needs."""
        wanted = self.head in ("soft_ce", "tv") and not self.head_on_rollouts
        return self.head if wanted else None

    @property
    def passes(self) -> tuple[tuple[bool, bool], ...]:
        """MTP passes of the joint loss, each as (gradient to trunk, gradient to head).

        None where no loss of an MTP depth acts. The trunk pass comes first. One loss for both needs
        one pass; two losses need two, since a parameter's gradient can't be told apart by the loss
        that it came from.
        """
        to_trunk = self.trunk != "none"
        if to_trunk and self.head == "same_as_trunk":
            return ((True, True),)
        own_pass = self.has_own_loss and not self.head_on_rollouts
        return ((True, False),) * to_trunk + ((False, True),) * own_pass

    @property
    def cut_passes(self) -> tuple[tuple[bool, bool], ...]:
        """The passes of an update in which MTP's gradient does not reach the trunk by the loss.

        Its coefficient is 0, or the gradient is added apart from the loss. A head that shares the
        trunk's loss keeps a pass, with a gradient of zeros: an overlapped reduction waits for it.
        """
        if self.head == "same_as_trunk":
            return ((False, True),)
        return tuple(one for one in self.passes if one == (False, True))
