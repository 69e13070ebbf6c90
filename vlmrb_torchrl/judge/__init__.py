"""Is this VLM any good here? ``python -m vlmrb_torchrl.judge --help``; see ``README.md``.

The report on a judge: clips of an environment are collected, scored, and held against what the
simulator says happened in them.
"""
