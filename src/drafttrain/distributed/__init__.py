"""Several processes that train together: who they are, how they wait for each other, who is missing."""
