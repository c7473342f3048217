"""Another method."""

NAME = "fancy"
