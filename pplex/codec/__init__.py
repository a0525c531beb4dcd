"""Mimi: PCM to codes and back."""
