"""A method."""
