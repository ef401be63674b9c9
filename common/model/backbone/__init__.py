"""The frozen backbone: where it comes from, its shape, its fingerprint."""
