"""Heads that predict acceptance or judge tokens: not written yet."""
