"""What the service and the training worker must agree on; nothing that only one of them needs."""

__version__ = "0.1.0"
"""As in pyproject.toml; a Bento has no metadata of an installed package to ask."""
