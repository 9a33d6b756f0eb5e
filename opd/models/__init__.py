"""Which weights a run starts from, and what of them is trained; the files of a model folder, and
what in them is checked."""
