"""Evaluation: matte a dataset, or take existing alphas, and score them."""
