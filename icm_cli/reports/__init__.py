"""Reports: what became of every image, its scores, their means, and the files and pages that show them."""
