"""How many demonstrations does a task need? The same queries, by the number of shots."""

from typing import Any, ClassVar

import plotly.graph_objects as go
import xarray as xr

import tvlens as tv
from tvlens.experiments import experiment
from tvlens.intervals import accuracy
from tvlens.plots.theme import figure, titled
from tvlens.provenance import ATTRIBUTE, collect, encode


class ShotsCurve(tv.Result):
    """Outcomes of one task for each number of demonstrations."""

    kind = "shots_curve"
    references = ("hendel2023context",)
    variables: ClassVar = {"split": ("prompt",), "regular": ("prompt", "shots")}
    title = property(lambda self: f"Shots: {self.provenance['task']}")

    def finding(self) -> str:
        share = accuracy(self.data, "regular")["accuracy"]
        return f"Best with {int(share.idxmax('shots'))} shots: {float(share.max()):.2f}."

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"task": self.provenance["task"]}

    def plot(self, **channels: Any) -> go.Figure:
        share = accuracy(self.data, "regular")
        drawn = figure(xaxis_title="shots", yaxis_title="accuracy", yaxis_range=[0, 1])
        up, down = share["high"] - share["accuracy"], share["accuracy"] - share["low"]
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        drawn.add_scatter(x=share["shots"], y=share["accuracy"], error_y=bars)
        return titled(drawn, self.finding())


@experiment("shots_curve")
def shots_curve(model: Any, task: Any, *, n_test=50, seed=0, progress=True) -> ShotsCurve:
    """Score the same queries with 0 to 5 demonstrations."""
    task = tv.load_task(task) if isinstance(task, str) else task
    shots = range(6)
    same = {"n": n_test, "split": "test", "seed": seed}
    made = [tv.build_prompts(task, model, shots=k, **same) for k in shots]
    right = [tv.score(model, prompts).correct.cpu().numpy() for prompts in made]
    name = tv.facts(model).name
    note = collect(kind="shots_curve", task=task.name, model=name, **same)
    coords = {"shots": list(shots), "split": ("prompt", ["test"] * n_test)}
    coords["query"] = ("prompt", list(made[0].queries))  # intervals count distinct ones
    data = xr.Dataset({"regular": (("shots", "prompt"), right)}, coords=coords)
    return ShotsCurve(data.assign_attrs({ATTRIBUTE: encode(note)}))
