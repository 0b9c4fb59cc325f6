"""The target: one frozen Hugging Face causal LM behind one small interface, and the cache that decoding needs."""
