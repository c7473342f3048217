"""Where files are fetched from: a package, a hub repository, a local folder."""
