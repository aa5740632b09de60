"""The in-context versus in-weight laboratory: when a model uses its context, when its weights."""
