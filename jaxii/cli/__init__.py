"""What each command does, from plain arguments; `jaxii.main` calls them."""
