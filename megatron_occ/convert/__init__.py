"""Weights between Hugging Face folders and Megatron-Core's checkpoints; imports no Megatron."""
