"""Ends every rank when one of them fails, whatever the others are waiting in.

Every rank, rank 0 too, holds a TCP connection to a hub in rank 0, watched by a thread of its own. A rank that fails
says so in a line of JSON; one that is killed leaves an end of file. The hub waits a moment for ranks that fail alike,
says once on the job's console what happened and tells everyone; all processes end with the failing rank's exit code.
Nothing is asked of a rank that is merely slow, and none is ever taken for dead while its connection stands.
"""
