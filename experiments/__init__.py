"""The evidence: configs, data, the training loop, records and tables."""
