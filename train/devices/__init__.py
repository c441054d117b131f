"""Training on a mesh of devices and in several processes."""
