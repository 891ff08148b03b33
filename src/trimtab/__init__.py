"""Policy optimization methods as small named changes to one loop."""
