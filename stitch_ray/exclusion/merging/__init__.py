"""`exar merge`: labelled answers of several temperatures become DATASET+."""
