"""One process at work on a run: its lock, progress, interruption and peak memory."""
