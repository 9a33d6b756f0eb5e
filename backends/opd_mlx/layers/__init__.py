"""Layers of the language trunk: attention, and gated delta nets."""
