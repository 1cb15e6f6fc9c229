"""The checks: one module per group, one function per check."""
