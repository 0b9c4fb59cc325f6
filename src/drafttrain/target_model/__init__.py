"""The target: one frozen Hugging Face causal LM behind one small interface, and the cache that decoding needs."""

from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target

__all__ = ["Target", "TargetSettings"]
