"""Sources of labelled images that shards are made of."""
