"""Predicted peak memory, its breakdown, the work of a step and the largest batch of a card."""
