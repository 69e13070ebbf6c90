"""How a run is kept: command line, checkpoints, telemetry, report."""
