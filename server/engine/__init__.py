"""The engine: one thread that steps the rows of all requests. Nothing here knows HTTP."""
