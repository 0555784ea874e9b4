"""What a device does: step times, peak memory, and sweeps of many cells."""
