"""Scoring of answers against references."""
