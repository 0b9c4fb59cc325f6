"""DSpark: a block in one pass, then a walk from left to right in which each token knows the one before it."""
