"""Is this model what tvlens takes it for? Small checks with a number, a tolerance and a meaning each.

Interpretability on a model that was wired a little differently fails silently: a hook that never fires, a
second BOS, a mask that leaks. Each check is one function in one table, so that a new one is one function
more: decorate it with `check`. Files of results keep what was measured.
"""

from tvlens.checking import forward, memory, text
from tvlens.checking.results import ModelCheck
from tvlens.checking.run import check_model
from tvlens.checking.subject import Subject
from tvlens.checking.table import CHECKS, Check, Measured, NotApplicable, check

__all__ = [
    "CHECKS",
    "Check",
    "Measured",
    "ModelCheck",
    "NotApplicable",
    "Subject",
    "check",
    "check_model",
]
_TABLES = (forward, text, memory)  # whose functions enter themselves into the table
