"""`exar refine`: generate, validate, exclude, generate again, on Ray Data."""
