"""Grammars that a text must follow, GBNF, Lark or JSON schemas, as masks over tokens."""
