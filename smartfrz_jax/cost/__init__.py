"""What a train step costs for any frozen set, predicted and measured, and why a saving did not come."""
