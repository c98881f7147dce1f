"""EXL2 and GPTQ models for text-generation-webui, with a memory reservation to trust."""

__version__ = "0.1.0"
