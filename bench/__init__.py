"""FPS and latency scripts."""
