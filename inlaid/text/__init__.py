"""From a request's words to tokens and back; the server, programs and LLM share it."""
