"""Training in several processes: ranks, collectives, and noticing a process that died."""
