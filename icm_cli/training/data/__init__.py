"""Training data: the pool of images with alphas, and the scenes and samples made from them."""
