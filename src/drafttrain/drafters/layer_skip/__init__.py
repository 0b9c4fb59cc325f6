"""Layer skipping: the target without some of its sublayers drafts for itself."""
