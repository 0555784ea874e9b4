"""What one step is, for a measurement and a prediction alike: the batches, the forward, the memory it takes."""
