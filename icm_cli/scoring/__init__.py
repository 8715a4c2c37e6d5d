"""Scores: alphas measured against ground truth in processes beside the model."""
