"""Online learning: the requests of a serving stack train the drafter, and a drafter is published only if it is better.

Each batch of requests takes the same way: `recorder.intake` -> `router` -> a `route` (one drafter), which filters by `plausible` and
puts a request into the held-out set or the `buffer`; then `learner` -> `promotion` -> `versions`. `loop` drives it. All state is in one
file that is written after each update, so a kill costs only the work since the last one.
"""
