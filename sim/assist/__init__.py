"""One patient's suggested list, on the terminal and on a local page."""
