"""EAGLE-1 and EAGLE-3: one decoder layer that reads the target's features."""
