"""One file a head; see ``icm_cli.model.contracts.Head``."""
