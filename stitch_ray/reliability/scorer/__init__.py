"""`train-scorer`: an encoder and signals made one probability."""
