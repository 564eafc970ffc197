"""Doctor: checks what the commands need, on this machine and on every node of a cluster."""
