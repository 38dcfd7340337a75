"""Requests for text between their routes and the engine; each file is named after the route that it answers."""
