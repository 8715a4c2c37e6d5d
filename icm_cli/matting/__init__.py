"""Matting: from references and sources to alphas on disk."""
