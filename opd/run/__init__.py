"""One run, from a recipe to a folder."""
