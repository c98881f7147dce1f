"""Forms that a text has to keep to: GBNF and JSON schemas, as masks over tokens."""
