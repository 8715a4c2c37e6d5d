"""Quality of alphas without the truth: an estimate for each image, and outliers of a run."""
