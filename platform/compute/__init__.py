"""Ray: sessions, workers, pools of actors, searches; and the machine at hand."""
