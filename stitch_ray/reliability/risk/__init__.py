"""`calibrate`: the threshold with a guarantee."""
