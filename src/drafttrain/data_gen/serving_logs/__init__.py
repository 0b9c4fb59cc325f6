"""Logs of a serving stack as training text: requests of clients and answers of the target, read as untrusted input.

A line passes: `untrusted` (limits, encoding, JSON) -> a dialect (`openai`, `sglang`, `vllm`) -> `exchange` -> `redaction` ->
`duplicates` -> `encoding` (token ids, labels, the logged distribution). `reading.LogReader` runs these steps. A line that fails at
any step is quarantined with its reason: `untrusted.guard` wraps all of them.
"""
