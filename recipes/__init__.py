"""Lightning Fabric recipes built on vlmrb_torchrl."""
