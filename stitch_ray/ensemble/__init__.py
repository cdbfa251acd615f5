"""Selective prediction: draft, score, refine where unsure, score again; answer or abstain. Knows nothing of Ray."""
