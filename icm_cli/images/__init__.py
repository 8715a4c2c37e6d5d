"""Read images of every common format upright, and write alphas with their provenance."""
