"""Speaks HTTP and decides what runs next."""
