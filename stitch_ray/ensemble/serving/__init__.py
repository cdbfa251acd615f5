"""Serving an ensemble, as far as it needs no server: checks before it starts, the book of answers, drift of confidences."""
