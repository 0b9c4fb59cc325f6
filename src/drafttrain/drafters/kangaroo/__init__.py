"""Kangaroo: the target's first blocks and an adapter."""
