"""The HTTP side: validates, tokenizes, streams.  Reaches the engine only through its client."""
