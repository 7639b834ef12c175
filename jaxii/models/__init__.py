"""Networks as pure functions over plain pytrees."""
