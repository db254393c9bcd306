"""What the two training scripts share, one concern a file."""
