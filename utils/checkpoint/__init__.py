"""What a run keeps: its folder, its checkpoints, and how it continues from them."""
