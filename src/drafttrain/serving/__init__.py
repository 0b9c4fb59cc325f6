"""Serving engines: what they do with exported files, compared with the evaluator; live servers and their counters."""
