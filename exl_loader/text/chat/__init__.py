"""Conversations as prompts: a model's own chat templates, rendered in a sandbox."""
