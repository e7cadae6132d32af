"""Quantised checkpoints: what their config says, and how their tensors become canonical weights."""
