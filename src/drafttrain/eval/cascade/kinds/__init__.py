"""Kinds of cascades, one file each."""
