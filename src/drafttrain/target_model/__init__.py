"""The target: one frozen Hugging Face causal LM behind one small interface, and the cache that decoding needs."""

from drafttrain.target_model.frozen import Target, TargetSettings

__all__ = ["Target", "TargetSettings"]
