"""What makes the things of a coarse alpha whole, one module each, bound to REGISTERED."""
