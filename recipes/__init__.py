"""Recipes that ship with the package, and the small checkpoints they use."""
