"""Small random checkpoints in the released format."""
