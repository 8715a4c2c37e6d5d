"""icm: in-context matting for whole folders."""
