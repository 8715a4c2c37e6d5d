"""Scoring of alpha files against ground truth files."""
