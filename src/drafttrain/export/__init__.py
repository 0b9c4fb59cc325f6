"""Export: one file a format."""
