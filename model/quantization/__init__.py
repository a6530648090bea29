"""Weights of 8 and 4 bits: which tensors have them, how numbers are rounded, and the layout of files that hold them."""
