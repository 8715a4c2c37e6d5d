"""The default model: small networks for CPUs, with weights that come with the package."""
