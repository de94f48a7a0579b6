"""A NumPy and Numba runtime for block-sparse model files."""
