"""GGUF files as Hugging Face folders: the header's reader, names and shapes of tensors, the tokenizer, the folder.

`model.weights.fetch`, `inlaid quantize` and `models.download_smollm2` call `folder.converted` and `folder.convert`.
"""
