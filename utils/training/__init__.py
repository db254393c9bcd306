"""The training itself: put together in build.py, run by trainer.py."""
