"""vitrail: an inference runtime for the InternVL vision-language family."""

__version__ = "0.1.0"
