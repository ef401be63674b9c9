"""What an adapter is worth: answers, metrics, baselines, judge and review."""
