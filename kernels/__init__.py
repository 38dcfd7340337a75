"""Numerical operations of MDM-Prime: one family of ops per file, with its torch reference as specification.

Beside them: `backend` (which implementation runs), `draw`, `short_rows` and `truncate` (how a draw chooses), and
`packed_digits`, `token_digits`, `token_sets` and `candidates` (which tokens agree with visible digits). `triton_ops`
holds the kernels.
"""
