"""How the layers of a trunk mix tokens: attention, and the gated delta net."""
