"""Another method."""
