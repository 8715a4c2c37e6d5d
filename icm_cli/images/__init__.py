"""Read images upright in every common format, and write alphas with a stamp of everything that
decided them."""
