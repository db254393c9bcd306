"""Around the workers: launcher, supervisor and what they need. The standard library only."""
