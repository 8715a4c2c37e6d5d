"""Reports: results and scores of images, their means, and the files and pages that present them."""
