"""Data of training: pools of pictures with alphas, and the scenes and samples that are made from them."""
