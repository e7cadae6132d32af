"""Several GPUs: which half runs where, what that costs, and what may be expected of it."""
