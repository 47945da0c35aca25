"""Regimes against each other: a study of arms x seeds from one checkpoint. Imports no torch."""
