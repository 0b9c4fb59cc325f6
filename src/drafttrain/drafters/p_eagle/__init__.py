"""P-EAGLE: an EAGLE-3 drafter of several layers that predicts all draft tokens of a round in one pass."""
