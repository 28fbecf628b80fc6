"""The layers of the transformer.

Shapes: T tokens, S sequences, K inputs and N outputs of a linear, H heads, D head size.
"""
