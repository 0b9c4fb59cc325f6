"""XPress: a block in one pass, then passes of a small causal head that read the tokens of the pass before."""
