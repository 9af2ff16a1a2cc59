"""Scores, their uncertainty, the baselines, and the table that carries its protocol."""
