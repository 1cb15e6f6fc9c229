"""Models that are right and unusual, one a file: each has a way to do things that a check once took for a mistake."""
