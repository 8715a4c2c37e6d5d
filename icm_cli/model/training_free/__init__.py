"""A head without trained weights, and closed-form matting."""
