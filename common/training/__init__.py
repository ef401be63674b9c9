"""The one training loop, its loss, gradient source, schedule and optimizer."""
