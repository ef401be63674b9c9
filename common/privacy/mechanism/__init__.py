"""Unit gradients, clipping, sampling, noise, and the release they make."""
