"""Tests of hidden states that an engine computes."""
