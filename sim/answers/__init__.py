"""What a finished run is asked: answers and metrics, the judge, the reviewers."""
