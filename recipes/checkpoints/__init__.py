"""Small checkpoints for a first run without a download."""
