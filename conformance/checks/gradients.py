"""Checks of the gradients group."""
