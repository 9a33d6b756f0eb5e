"""Tools for authors of backends: the conformance suite, committed numbers, and a backend in
numpy."""
