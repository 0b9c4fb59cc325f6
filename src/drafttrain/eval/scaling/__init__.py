"""How acceptance grows with the tokens that train a drafter, and with its size: forms fitted to finished runs."""
