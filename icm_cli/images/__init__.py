"""Read images upright in every common format, and write alphas that can be traced."""
