"""Ways to draw from a replay buffer: one file each."""
