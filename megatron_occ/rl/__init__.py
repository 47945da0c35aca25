"""Reinforcement learning with verifiable rewards: batches, rollouts, trainer, verifiers."""

# Empty of imports: every verifier process imports this package, and needs no torch.
