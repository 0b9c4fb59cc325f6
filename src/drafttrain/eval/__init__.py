"""The evaluator: engine, verification, metrics, replay, statistics, report."""
