"""Datasets of the field: where their files lie, what shows the same thing, and what is wrong with them."""
