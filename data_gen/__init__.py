"""Captions in, shards of generated images out; the shard format is the only door to training."""
