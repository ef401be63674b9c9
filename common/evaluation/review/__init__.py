"""The blinded packet for clinicians, its import and its scores."""
