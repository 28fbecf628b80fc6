"""Words and tokens: a request's text to token ids, and an answer's back. The server and LLM share it."""
