"""Matchers, building blocks, the frame of every method and their registry."""
