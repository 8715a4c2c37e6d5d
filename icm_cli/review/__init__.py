"""``icm review``: a local page on which a person checks the alphas of a run and corrects them."""
