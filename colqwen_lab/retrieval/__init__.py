"""What quantisation does to retrieval: BASE and variants embed the same queries and pages."""
