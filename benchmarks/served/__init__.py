"""What `benchmarks.serving` is made of."""
