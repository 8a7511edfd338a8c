"""How workers are started: on this machine, as the tasks of a Slurm array, or on a Ray cluster.

A job's plan is in its dataset and its workers agree through files there (`data_gen.job.worker`), so an engine
starts them, starts those again that died, tells them to stop, and knows nothing of shards.
"""
