"""Models known to be right, one readable file each."""
