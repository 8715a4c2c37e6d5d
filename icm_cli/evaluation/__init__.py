"""Evaluation: a dataset is matted in context, or foreign alphas are taken, and all of it is scored."""
