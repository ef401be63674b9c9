"""Attention over packed batches, and the layer that saves little."""
