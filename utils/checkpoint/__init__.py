"""What a run keeps: its folder, its checkpoints, and how it goes on from them."""
