"""migd moves the memory of a running guest to another host and leaves its free pages behind."""

__version__ = "0.1.0"
