"""Online learning: what a serving stack sees becomes a better drafter, and a worse one is never published.

A batch of requests goes one way: the intake of `data_gen.serving_logs` -> `plausible` -> `router` -> a `route`, which is one drafter:
held out or `buffer` -> `learner` -> `promotion` -> `versions`. `loop` drives it and `state` is one file, so a kill costs what came
since the last update.
"""
