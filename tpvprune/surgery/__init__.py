"""How it goes: slice units out of a network, or mask them, from the same plan."""
