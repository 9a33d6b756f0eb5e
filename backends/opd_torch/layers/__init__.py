"""The layers of the language trunk: attention, and the gated delta net."""
