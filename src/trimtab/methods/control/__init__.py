"""Methods whose decisions are actions in an environment."""
