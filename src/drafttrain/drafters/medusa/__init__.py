"""Medusa: several heads on the target's final hidden state."""
