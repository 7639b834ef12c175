"""What a train step takes of devices that need not be there."""
