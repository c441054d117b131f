"""What the figures of this project come from."""
