"""MIMIC-IV's tables, read by header name, to one row per admission."""
