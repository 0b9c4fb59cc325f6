"""The target: a frozen Hugging Face causal LM behind a small interface, and its cache for decoding."""

from drafttrain.target_model.settings import TargetSettings
from drafttrain.target_model.target import Target

__all__ = ["Target", "TargetSettings"]
