"""Measuring: reconstruction, semantics, and results that can only be compared when they mean the same
thing."""
