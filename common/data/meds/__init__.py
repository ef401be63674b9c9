"""Data sets in MEDS, the Medical Event Data Standard: one row per event, in parquet shards."""
