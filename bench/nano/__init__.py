"""Pictures and questions of the bundled model: drawn here, learned by tools/nano, measured by bench/quality.py."""
