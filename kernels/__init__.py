"""One operation a file: launcher and torch reference. The only code that knows about devices."""
