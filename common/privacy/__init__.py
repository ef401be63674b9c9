"""Differential privacy of B: plan, noise, sampling, clipping, ledger, accounting, receipts."""
