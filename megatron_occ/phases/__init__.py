"""Pretraining, RL and validation of a run, put together as its configuration says."""
