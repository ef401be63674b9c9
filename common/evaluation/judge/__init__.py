"""Appropriateness by LLM judges."""
