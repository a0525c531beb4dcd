"""Prompts, the step loop, and conversations."""
