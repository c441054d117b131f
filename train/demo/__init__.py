"""``make demo``: full training of a pre-trained network beside training with its front frozen."""
