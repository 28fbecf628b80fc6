"""Tool calls and reasoning in an answer's text, as models write them: parsed while the text comes, or forced."""
