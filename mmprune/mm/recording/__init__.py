"""What a run notes of itself for its page: plain data in its folder and in its checkpoints."""
