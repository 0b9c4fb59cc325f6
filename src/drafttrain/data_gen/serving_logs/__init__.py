"""Logs of a serving stack as training text: what a client asked and what the target answered, read as untrusted input.

A line goes one way: `untrusted` (limits, encoding, JSON) -> a dialect (`openai`, `sglang`, `vllm`) -> `exchange` -> `redaction` ->
`duplicates` -> `encoding` (token ids, labels, the logged law). What fails anywhere is quarantined with its reason: `untrusted.guard` stands around all of it.
"""
