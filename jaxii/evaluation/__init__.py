"""What is done with a trained network: measure, choose, decode, predict, report."""
