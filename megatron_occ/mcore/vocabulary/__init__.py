"""Log-probs from hidden states over a large vocabulary, in little memory."""
