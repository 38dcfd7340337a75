"""Tiny models by enumeration: the yardstick of the tests, which shares no code with what it measures."""
