"""What a layer is, how layers are found, and their outputs."""
