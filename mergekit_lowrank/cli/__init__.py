"""The command ``mergekit-lowrank``: thin commands over the public API.

``commands`` holds the command line itself and imports nothing heavy, so that help and usage errors come at once. Each
command imports the module that does its work when it runs.
"""

from mergekit_lowrank.cli.commands import main

__all__ = ["main"]
