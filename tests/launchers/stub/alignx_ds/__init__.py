"""Stands in for the product where only signals and exit codes matter: it starts at once."""
