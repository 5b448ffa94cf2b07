"""A worker turns blocks of examples into sums; datasets as the driver knows them. Knows nothing of Ray."""
