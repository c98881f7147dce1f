"""Grammars that a text must follow, GBNF or JSON schemas, as masks over tokens."""
