"""Early exit: the target drafts with its first blocks, its final norm and its head."""
