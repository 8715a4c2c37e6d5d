"""The core model: one module for matte, eval and train, a backbone joined with a head."""
