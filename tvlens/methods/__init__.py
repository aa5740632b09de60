"""Ways to make a task vector, each behind one call, so that they can be compared.

A method sees dev prompts of a task, whose queries and demonstrations are none of the test queries, and gives
back what it would write into a prompt without demonstrations. Layers and other choices are made on the dev
prompts as well. What it cost is counted in forwards: one prompt once through the model; a step of gradient
descent counts three for each of its prompts.
"""

from collections.abc import Callable

from tvlens._errors import unknown
from tvlens.methods.heads import function, function_gradient
from tvlens.methods.maps import principal, ridge
from tvlens.methods.means import attention, chosen, hendel, mean, mean_more, multi_position
from tvlens.methods.trained import learned, learned_shuffled
from tvlens.methods.work import Fitted, Work, Write

METHODS: dict[str, Callable[[Work], Fitted]] = {
    method.__name__: method
    for method in (
        hendel, mean, mean_more, attention, multi_position, chosen, principal, ridge, function,
        function_gradient, learned, learned_shuffled,
    )
}  # fmt: skip
"""By name, each way to make a vector."""
TRAINED = ("learned", "learned_shuffled")
"""Those that take gradients of the vector."""


def fit(name: str, work: Work) -> Fitted:
    """Let a method see a task.

    Args:
        name: A name of `METHODS`.
        work: The task.

    Returns:
        What it would write, where, and what that cost.

    Raises:
        ValueError: There is no such method, or too few items for it.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> how = {"shots": 2, "n": 6, "n_dummy": 2, "template": "example", "answers": "auto"}
        >>> how |= {"split": "dev", "demonstrations": "split", "seed": 0}
        >>> model, task = tiny_model(), tv.load_task("to_upper")
        >>> work = Work(model, task, tv.build_prompts(task, model, **how), how)
        >>> [edit.site for edit in fit("mean", work).write(work.dev, work.dev.zero_shot)]
        ['resid_post']
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return work.fitted(METHODS[name])


__all__ = ["METHODS", "TRAINED", "Fitted", "Work", "Write", "fit"]
