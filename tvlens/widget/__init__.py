"""Play with a model: type a prompt, write into one cell of its residual stream, and watch what it then says.

`explore` gives an `Explorer`. In Jupyter it is a panel: the lens heat map of a prompt, a cell to choose, what
to write there (another run's state, a task vector, a random one), how strongly, and the next token with and
without it. Where no panel can run it is a static grid. From Python it is the same thing without a mouse:
``explorer.set(layer=20)``, ``explorer.effect``. Everything runs through the engine.
"""

from tvlens.widget._desk import Effect, Scene
from tvlens.widget._explorer import Explorer, explore
from tvlens.widget._state import State

__all__ = ["Effect", "Explorer", "Scene", "State", "explore"]
