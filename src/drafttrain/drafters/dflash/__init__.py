"""Block drafters: DFlash, its causal form JetSpec, and the parts that other block kinds share."""
