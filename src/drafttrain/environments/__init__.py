"""Environments of serving engines and libraries: each is installed once from its pins and asked through a worker file."""
