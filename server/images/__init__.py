"""Requests for images between their routes and the engine, and what a client may send of a picture."""
