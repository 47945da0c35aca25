"""Audit of a checkpoint: does MTP's gradient point where RL's does, and by how much."""
