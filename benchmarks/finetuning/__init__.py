"""The sections of `benchmarks.training`, and the programs that it runs beside each other."""
