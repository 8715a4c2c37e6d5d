"""Measure alphas: the field's metrics and protocols, its datasets, and reports that people read."""
