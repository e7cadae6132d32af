"""Schedules requests over the two halves of a model."""
