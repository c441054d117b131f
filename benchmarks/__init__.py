"""Where the performance figures come from."""
