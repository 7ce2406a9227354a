"""What a run leaves on disk, and what a later look at it reads."""
