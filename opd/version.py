"""The version of all packages of the distribution; pyproject.toml says the same."""

__version__ = "0.1.0"
