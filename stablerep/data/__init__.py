"""How shards become batches: order, reading, verification, decoding."""
