"""The data sets, and the batches that a step takes of them."""
