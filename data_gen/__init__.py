"""Captions in, shards of generated images out. The shard format (`data_gen.shards`) is the only door to training."""
