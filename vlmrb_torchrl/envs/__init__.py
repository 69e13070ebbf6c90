"""Environments: one file each, with its prompt, render state and renderer."""
