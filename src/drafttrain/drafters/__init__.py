"""Drafters, one folder a kind: the trainable module and its proposer. Parts that several kinds use stand beside the folders."""

from drafttrain.drafters.drafter import Drafter, drafters

__all__ = ["Drafter", "drafters"]
