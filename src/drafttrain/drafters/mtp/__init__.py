"""Next-token-prediction layers of a target, trained on their own rollouts."""
