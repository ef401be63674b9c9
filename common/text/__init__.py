"""Text of an admission, and packed token batches."""
