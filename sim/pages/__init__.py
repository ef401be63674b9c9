"""Templates of all that is written for people and programs, and what fills them in."""
