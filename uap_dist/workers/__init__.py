"""Workers, which compute results for examples of shards, and data sets as the driver sees them. Nothing here knows Ray."""
