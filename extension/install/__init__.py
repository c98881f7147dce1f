"""Installs the loader into a text-generation-webui, uninstalls it, and diagnoses problems.

Standard library only, because any Python may run it; it examines the web UI's own Python from
outside.
"""
