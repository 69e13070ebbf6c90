"""Judges of clips: one TensorDictModule each, clips in, score in [0, 1] out."""
