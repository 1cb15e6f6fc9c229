"""Checks of the logits group."""
