"""Consistency training: the target learns to solve blocks of its own text in few Jacobi iterations."""
