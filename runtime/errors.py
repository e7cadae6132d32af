"""The errors vitrail raises. All derive from `VitrailError`; none needs torch."""


class VitrailError(Exception):
    """Base of every error that vitrail raises on purpose."""


class ConfigError(VitrailError):
    """A `config.json`, or an option, that vitrail cannot follow."""


class CheckpointError(VitrailError):
    """Tensors or files of a checkpoint that are missing, extra, misshapen or unreadable, by name."""


class InvalidRequestError(VitrailError, ValueError):
    """A request that can never be answered as it stands. Its message names what is wrong and where."""


class UnsupportedError(VitrailError):
    """Something that this model, device or installation does not offer."""


class CapacityError(InvalidRequestError):
    """A request that can never fit the configured limits."""
