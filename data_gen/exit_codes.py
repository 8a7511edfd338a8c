"""The exit codes of the verbs that make and check datasets; docs/generation.md says what to do about each.

The front door adds 2 for a command line that it cannot read, and 130 for Ctrl-C.
"""

EXIT_DONE = 0
"""All is there: every caption is written, every file is sound."""

EXIT_FAILED = 1
"""An error, said in one line; or all is done, but captions failed, shards are set aside or files are bad."""

EXIT_DONE_WITH_FAILURES = 3
"""What a worker process says to the engine that started it in place of the second meaning of 1, with which
Python itself ends at an error."""

EXIT_SHARD_FAILED = 70
"""A worker process met an error within a shard, or stood still there; another one may take its place."""

EXIT_UNFINISHED = 75
"""Something is left to be made: the job was told to stop, or others are at work."""
