"""Pictures on disk: read upright in every usual kind, and alphas written so that they say what decided them."""
