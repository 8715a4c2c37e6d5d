"""How the model learns: ``icm_cli.train``, the body of ``icm train``, is :func:`icm_cli.training.train.train`."""
