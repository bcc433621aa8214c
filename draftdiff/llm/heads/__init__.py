"""Trained draft heads, which read the target's hidden states: one file a kind of module."""
