"""verl agent loops: a dialogue, token streams and verl's LLM client."""
