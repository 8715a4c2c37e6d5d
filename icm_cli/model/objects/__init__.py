"""Networks that make the things of a coarse alpha whole, one file each."""
