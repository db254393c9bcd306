"""How the workers communicate: the two engines behind one contract, and what all ranks agree on."""
