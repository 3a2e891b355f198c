"""Methods of pruning beside each other: one net, one data set, one training loop, one machine."""
