"""How a worker solves blocks: from examples to batches on its device, and through the network."""
