"""MatFormer: a causal LM whose feed-forward blocks are nested in each other."""
