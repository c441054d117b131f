"""What freezing saves in fine-tuning a decoder: on paper for large ones, measured for a small one."""
