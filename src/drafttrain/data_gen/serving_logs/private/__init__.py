"""Finds private content in text: issued keys, named secrets, e-mail addresses, telephone, card and account numbers, public IP addresses.

Each file has one `find(text)` that yields spans. Every search starts at something rare (an `@`, a name, a long word, a prefix) and
reads a bounded number of characters around it, so that its time is linear in the length of the text.
"""
