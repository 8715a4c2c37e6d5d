"""Files: paths, system errors, atomic writes, digests, JSON."""
