"""Checks of the deployment group."""
