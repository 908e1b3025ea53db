"""Number formats: element formats, rounding and block scales. Pure functions on torch tensors."""
