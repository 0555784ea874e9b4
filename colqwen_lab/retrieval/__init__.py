"""What quantising does to retrieval: the same queries and pages through BASE and a variant, and what changed."""
