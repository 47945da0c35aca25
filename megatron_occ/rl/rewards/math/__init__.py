"""The ``math`` verifier: where the answer stands, what it is, and whether it is the reference."""
