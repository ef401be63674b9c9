"""What can be known without a run: plan, doctor, audit."""
