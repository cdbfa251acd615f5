"""The sections of `benchmarks.reliability`."""
