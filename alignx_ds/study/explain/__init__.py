"""`alignx-ds explain`: the gates' decisions about single prompts, term by term, and every system's answers."""
