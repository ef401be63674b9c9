"""Synthetic MIMIC-IV tables with planted structure and defects."""
