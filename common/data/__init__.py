"""MIMIC-IV tables to samples, splits and hospitals."""
