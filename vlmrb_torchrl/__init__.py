"""VLM-guided experience replay for TorchRL (VLM-RB, arXiv 2602.01915)."""
