"""ColQwen3: the network, its variants, where weights come from, how they are quantised and loaded."""
