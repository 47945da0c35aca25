"""megatron_occ: joint multi-token-prediction and reinforcement learning on Megatron-Core."""

__version__ = "0.1.0"
