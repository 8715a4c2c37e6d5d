"""One file a backbone; see ``icm_cli.model.contracts.Backbone``."""
