"""What Megatron-Core needs on machines without a CUDA device."""
