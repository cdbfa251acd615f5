"""Selective prediction: draft, score, refine where unsure, score again; answer or abstain. Only `batch` knows of Ray."""
