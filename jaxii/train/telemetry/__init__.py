"""What training logs, draws and tracks."""
