"""The HTTP API of a served ensemble, over any `Service`. Knows nothing of Ray."""
