"""ColQwen3: its network, variants, weights, quantisation and loading."""
