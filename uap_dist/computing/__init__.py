"""A tracked run of the loop over rounds, and a pool of such runs."""
