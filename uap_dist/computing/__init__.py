"""The loop over rounds (section 2 of the paper), and whole runs of it: one perturbation or a pool."""
