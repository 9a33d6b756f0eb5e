"""For authors of backends: the conformance suite, its fixtures, and a backend in numpy."""
