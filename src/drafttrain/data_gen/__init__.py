"""Data: sources of records, templates and masks, generation by the target, sampler, packing, cache."""
