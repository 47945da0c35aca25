"""Weights between Megatron-Core's checkpoints and Hugging Face folders; imports no Megatron."""

from megatron_occ.convert.dense import hugging_face_config, hugging_face_tensors
from megatron_occ.convert.folder import write_folder

__all__ = ["hugging_face_config", "hugging_face_tensors", "write_folder"]
