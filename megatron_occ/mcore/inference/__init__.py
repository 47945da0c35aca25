"""The embedded rollout engine: Megatron's weights, a KV cache by slots, drafts by the MTP head."""
