"""Training tasks for the command line."""
