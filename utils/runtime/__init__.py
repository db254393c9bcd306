"""The machine that computes: device, precision, memory, and the record of it in results."""
