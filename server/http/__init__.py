"""The HTTP side: validates, tokenizes, streams.  Reaches the engine through its client alone."""
