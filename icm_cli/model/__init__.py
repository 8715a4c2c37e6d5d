"""The model of matte, eval and train: its components, and loading and saving of its weights."""
