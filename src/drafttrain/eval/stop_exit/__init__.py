"""A controller of code completion: after each of some blocks of the target go on, exit with a token, or stop the completion. LOSSY."""
