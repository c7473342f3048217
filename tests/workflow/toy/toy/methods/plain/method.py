"""A method."""

NAME = "plain"
