"""The accuracy harness: is the quantized base still good at every task? `python -m eval.run --help` is the way in."""
