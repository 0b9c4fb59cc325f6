"""Hidden Transfer: linear maps make states of the next tokens inside the target, whose remaining blocks complete them."""
