"""The configuration of a run: flags, what they may be, recipes. Nothing here imports torch."""
