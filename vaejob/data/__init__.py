"""From bytes to batches: manifest, shards, order, reader, decode, batches."""
