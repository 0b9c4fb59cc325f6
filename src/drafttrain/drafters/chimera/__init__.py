"""Chimera: one layer over the target's final states and trigrams of the newer tokens, and a head for every draft token."""
