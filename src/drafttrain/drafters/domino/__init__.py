"""Domino: a block in one pass, then a walk whose correction depends on all tokens of the block before."""
