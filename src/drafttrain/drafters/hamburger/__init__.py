"""HAMburger: the target reads its answer in segments, one cache entry each, and a micro decoder drafts the rest of a segment."""
