"""The transformer, once, for every family, and where its weights come from."""
