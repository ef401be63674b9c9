"""What a person reads: pages, plots, tables on the terminal."""
