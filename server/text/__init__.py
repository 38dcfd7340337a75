"""Requests for text between their routes and the engine."""
