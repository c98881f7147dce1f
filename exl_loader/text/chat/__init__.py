"""Conversations as prompts: the templates that models bring, in a sandbox of our own."""
