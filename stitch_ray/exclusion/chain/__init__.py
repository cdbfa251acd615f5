"""`exar run`: the whole chain from questions to an evaluated refinement."""
