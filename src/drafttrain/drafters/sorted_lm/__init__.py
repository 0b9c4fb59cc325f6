"""Sorted drafters (S2D): a causal LM whose first layers are drafters too."""
