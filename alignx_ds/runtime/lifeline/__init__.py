"""Ends every rank when one of them fails, whatever the others are waiting for.

Every rank, rank 0 included, has a client thread with a TCP connection to a server thread in rank 0. A rank that fails
reports it as a line of JSON; the connection of a rank that was killed closes. The server waits a moment, because ranks
often fail alike, prints once what happened and tells all ranks to exit with the exit code of the rank that failed.
A slow rank is never mistaken for a dead one: there are no heartbeats, only the connection counts.

`rendezvous` connects a rank; `server` and `client` are the two ends; `connection` carries their messages.
"""
