"""The machine that computes: device, precision, memory, and what a result says of it."""
