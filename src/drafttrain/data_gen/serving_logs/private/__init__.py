"""Finds what is private in text: issued keys, secrets by their names, e-mail addresses, telephone, card and account numbers, addresses of hosts.

Each file has one `find(text)` that yields spans. Every search stands on something rare (an `@`, a name, a long word, a prefix) and looks a
bounded number of characters around it, so that a text costs time by its length, whatever it holds.
"""
