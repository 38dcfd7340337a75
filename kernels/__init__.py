"""Numerical operations of MDM-Prime: one public op per file, with its torch reference as specification."""
