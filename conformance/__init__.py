"""The catalogue of checks, the numerics of agreement, and what a verdict says."""
