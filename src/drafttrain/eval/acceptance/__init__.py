"""Acceptance rules, one file each: which draft tokens are accepted."""

from drafttrain.core.registry import Registry

acceptance_rules = Registry("acceptance rule", "drafttrain.eval.acceptance")
