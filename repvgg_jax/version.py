"""The version of the package, which `pip` shows too."""

VERSION = "0.1.0"
