"""Length policies, one file each: how many tokens to draft, and when to stop drafting."""

from drafttrain.core.registry import Registry

length_policies = Registry("length policy", "drafttrain.eval.length")
