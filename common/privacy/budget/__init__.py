"""What was spent: ledger, guard, receipts."""
