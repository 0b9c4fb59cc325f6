"""Search over the steps of a solution with a reward of partial ones: A*-decoding, best of n, particle filtering.

The output is not drawn from the target's distribution: LOSSY. Every step is, speculatively and losslessly.
"""
