"""drafttrain trains the drafters of speculative decoding and proves what they yield."""

__version__ = "0.1.0"
