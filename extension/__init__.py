"""exl_loader's user interfaces: plugin of text-generation-webui, standalone page, installer."""
