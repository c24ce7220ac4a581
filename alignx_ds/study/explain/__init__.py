"""One decision in full: which expert a prompt went to, and why, and what every expert would have answered."""
