"""TokenFlow."""
