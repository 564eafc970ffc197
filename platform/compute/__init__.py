"""Ray sessions, workers, actors, jobs and searches, and the load of the machine."""
