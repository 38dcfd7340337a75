"""The server: one engine thread that steps rows, and an HTTP side that turns requests into rows and back."""
