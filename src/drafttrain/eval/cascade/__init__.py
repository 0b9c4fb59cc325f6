"""Cascades: two models share a text, and tokens of the small one stand without verification. LOSSY: the output changes."""

from drafttrain.core.registry import Registry

cascades = Registry("cascade", "drafttrain.eval.cascade.kinds")
span_judges = Registry("span judge", "drafttrain.eval.cascade.judges")
