"""Choices of a prompt's keys or tokens, one file a kind. Each names its paper."""
