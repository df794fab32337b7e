"""See a run: trajectories on disk, health signals, an offline HTML page and a terminal viewer."""
