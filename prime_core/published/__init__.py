"""Imports published networks, and runs no code of theirs."""
