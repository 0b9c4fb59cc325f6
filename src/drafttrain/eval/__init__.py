"""Evaluation: engine, verification, metrics, replay, statistics, result, report."""
