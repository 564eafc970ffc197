"""Launch: runs a command of Patchloom as a job on a Ray cluster."""
