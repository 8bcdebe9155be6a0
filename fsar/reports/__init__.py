"""Figures, provenance, published numbers, and the notebooks that become reports."""
