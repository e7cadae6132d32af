"""`config.json` in each form that checkpoints have it, one file a form."""
