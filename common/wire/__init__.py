"""The wire contract: what a message between server and hospital may hold."""
