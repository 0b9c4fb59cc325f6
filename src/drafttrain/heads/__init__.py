"""Heads, one file a kind: small modules that score one draft token from one hidden state of a frozen model."""

from drafttrain.heads.token_head import TokenHead, heads

__all__ = ["TokenHead", "heads"]
