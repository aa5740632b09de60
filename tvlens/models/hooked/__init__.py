"""HookedTransformer: all that is particular to TransformerLens' own model class, and nothing else.

`config` reads a Hugging Face configuration, `convert` turns the weights, `run` drives the model block by
block for the engine. Another model kind is another folder beside this one.
"""
