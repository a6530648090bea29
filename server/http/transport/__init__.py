"""Bytes of connections to requests and answers: HTTP/1.1, TLS, bodies, events.  Knows no endpoint."""
