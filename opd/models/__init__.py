"""Finds the model that a run starts from, says which parameters train, and reads and checks the
files of a model folder."""
