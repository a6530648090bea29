"""Turns token ids into logits and samples, and text into token ids.  Knows nothing of HTTP or scheduling."""
