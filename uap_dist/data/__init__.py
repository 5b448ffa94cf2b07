"""Images: shards on disk or in object storage, fetched, decoded, cached and written."""
