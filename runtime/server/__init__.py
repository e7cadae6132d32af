"""The OpenAI-compatible server: `vitrail serve` (docs/server.md). Needs the extra `server`."""
