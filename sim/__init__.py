"""What a researcher starts: the command line and everything behind its verbs."""
