"""What a device does: time, memory and environment of every cell of a sweep."""
