"""Lexical units: the target predicts the rest of a unit of its text at look-ahead tokens of the same call."""
