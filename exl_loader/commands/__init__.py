"""Subcommands of `python -m exl_loader`, one module each."""
