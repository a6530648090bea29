"""Kernels for CPUs, in C: the whole network as one call a step.

Without them, `persimmon.kernels.reference` computes.
"""
