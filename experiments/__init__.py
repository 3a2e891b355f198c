"""The evidence: configs, data, the training loop, measurements, reports of their records, studies of many runs."""
