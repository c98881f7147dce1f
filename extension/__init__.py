"""User interfaces: plugin of text-generation-webui, TabbyAPI backend, page, installer."""
