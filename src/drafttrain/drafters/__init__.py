"""Drafters, one folder per kind: the trainable module and its proposer. Shared parts are next to the folders."""

from drafttrain.drafters.drafter import Drafter, drafters

__all__ = ["Drafter", "drafters"]
