"""Trains one run, from a recipe to a run folder."""
