"""Targets, checkpoints, scenarios, hosts and evidence; nothing in here knows pytest."""
