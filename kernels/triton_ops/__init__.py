"""Triton kernels and their launchers, one op a file under the name of its reference in `kernels`."""
