"""Cleaning rules, whoever wrote the tables: columns in, one row per admission out."""
