"""The loop over rounds (section 2 of the paper), on any workers: how long a run is, its rounds one by one, several runs at once."""
