"""The independent drafter: a separate, smaller causal LM."""
