"""Installs into a text-generation-webui or a TabbyAPI, uninstalls, and diagnoses problems.

Standard library only, because any Python may run it; it examines the host's own Python from
outside.
"""
