"""TransformerBridge: all that is particular to TransformerLens' second model class, and nothing else.

A bridge wraps a Hugging Face model and renames its parts; the weights stay Hugging Face's. `convert` builds
one, `parts` takes its blocks apart for the engine, `rotary` gives the angles of positions, `run` drives it.
The names are parallel to those in `tvlens.models.hooked`.
"""
