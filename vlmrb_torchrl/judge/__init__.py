"""Is this VLM any good here? ``python -m vlmrb_torchrl.judge --help``.

Collects clips of an environment, has judges score them, holds the scores against the simulator's
events and writes a report.
"""
