"""What keeps a long run alive: checkpoints, exact resume, stopping in time."""
