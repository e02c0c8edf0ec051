"""What networks see."""
