"""Learning from what a serving stack sees, without a patched engine."""
