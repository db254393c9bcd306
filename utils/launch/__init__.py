"""Around the workers: the supervisor and what it needs. The standard library only."""
