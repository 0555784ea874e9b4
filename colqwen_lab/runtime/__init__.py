"""One step of a measurement or a prediction: its batches, its forward, its memory."""
