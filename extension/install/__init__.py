"""Puts the loader into a text-generation-webui, takes it out, and says what is wrong with it.

Standard library only: it is run by whatever Python the user has, and looks at the web UI's
own Python from outside.
"""
