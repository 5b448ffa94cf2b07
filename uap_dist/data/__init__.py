"""Image data: shards on disk or in object storage are located, fetched, decoded, cached and written."""
