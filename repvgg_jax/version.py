"""The version, also of what `pip install` shows."""

VERSION = "0.1.0"
