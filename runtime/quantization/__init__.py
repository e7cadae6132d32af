"""Weights of 8 and 4 bits: methods, what a Linear calls, and the formats of quantised checkpoints."""
