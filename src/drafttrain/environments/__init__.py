"""Environments of serving engines, each made once from its pins, outside of any project."""
