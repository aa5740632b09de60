"""Can task vectors be added up? Last-and-upper from first-and-upper, last and first.

If a vector of "the first item, in upper case" is that of a place plus that of a rule, then taking the vector
of "the first item" away and adding that of "the last item" must give "the last item, in upper case", although
no demonstration ever showed it: v_BD* = v_AD + v_BC - v_AC. The composed vector stands next to the one that
demonstrations of the composed task give, to each of its parts, and to random vectors.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown, whole
from tvlens.encoding import Encoder, first_tokens, settle
from tvlens.engine import Edit, FirstToken, Read, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._composition import (
    CORNERS,
    KINDS,
    PLACES,
    RUNS,
    Composition,
    dataset,
    list_tasks,
    several_lengths,
)
from tvlens.experiments._dev import resolved
from tvlens.extraction import average, dummy_requests
from tvlens.function_vectors import function_vector
from tvlens.function_vectors.effects import indirect_effects
from tvlens.models import facts, load_model
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.tasks import Task
from tvlens.templates import Template, get_template
from tvlens.vectors import TaskVector

PARTS = ("ac", "bc", "ad")


@dataclass(frozen=True)
class _Settings:
    """What is the same for every rule."""

    shots: int
    n_vectors: int
    n_heads: int
    n_trials: int
    n_dev: int
    n_test: int
    n_dummy: int
    seed: int


@experiment("composition")
def composition(
    model: Any,
    tasks: Sequence[Task | str] = ("to_upper", "next_letter"),
    *,
    places: str | Sequence[str] = tuple(PLACES),
    vectors: str | Sequence[str] = KINDS,
    shots: int = 5,
    n_vectors: int = 25,
    n_heads: int = 10,
    n_trials: int = 25,
    n_dev: int = 25,
    n_test: int = 50,
    n_dummy: int = 2,
    n_lists: int = 200,
    lengths: int | Sequence[int] = (2, 3, 4),
    template: str | Template = "example",
    seed: int = 0,
    progress: bool = True,
) -> Composition:
    """Compose the vector of "the last item, with a rule applied", say, from vectors of three other tasks.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: The rules, each a task over items that a list can hold, or its name.
        places: Which item of the list the composed task takes: ``"last"``, ``"first"``, or both in turn.
        vectors: ``"theta"``, ``"function_vector"``, or both.
        shots: Demonstrations a prompt.
        n_vectors: Prompts over which a vector is averaged.
        n_heads: How many heads a function vector sums.
        n_trials: Prompts with shuffled labels on which heads are chosen, for each of the three parts.
        n_dev: Bare queries on which layers are chosen.
        n_test: Bare queries on which accuracies are reported.
        n_dummy: Dummy queries over which theta is averaged.
        n_lists: How many lists there are; half of them are asked in test queries alone.
        lengths: How many items a list may have; one number, or several.
        template: How a demonstration is written, see `tvlens.Template`.
        seed: Decides lists, prompts, and random vectors.
        progress: Whether to show a progress bar.

    Returns:
        Which task each prompt obeyed under every vector, as a result that draws itself.

    Raises:
        ValueError: Unknown names, a rule without enough items, too few lists for the shots, or no dummy
            query.
        TypeError: A number that is none.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> small = {"shots": 2, "n_vectors": 3, "n_heads": 2, "n_trials": 3, "n_dev": 3, "n_test": 4}
        >>> found = composition(tiny_model(), ["to_upper"], n_lists=30, **small, progress=False)
        >>> found.data["run"].values.tolist()
        ['composed', 'direct', 'ad', 'bc', 'ac', 'random']

    References:
        Todd et al. 2024, arXiv:2310.15213, section 3.3.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    places, vectors = ([one] if isinstance(one, str) else [*one] for one in (places, vectors))
    sizes = several_lengths(lengths)
    if whole("n_dummy", n_dummy) < 1:
        raise ValueError(f"theta is read on dummy queries: n_dummy >= 1; {n_dummy} arrived.")
    for what, names, known_names in (
        ("kind of vector", vectors, KINDS),
        ("place", places, tuple(PLACES)),
    ):
        for name in names:
            if name not in known_names:
                raise unknown(what, name, known_names)
    kinds, rules = [name for name in KINDS if name in vectors], resolved(tasks)
    if not rules or not kinds or not places:
        raise ValueError("at least one rule, one place and one kind of vector are needed.")
    model = load_model(model) if isinstance(model, str) else model
    settings = _Settings(shots, n_vectors, n_heads, n_trials, n_dev, n_test, n_dummy, seed)
    found, heads, made = {}, {}, {}
    with tqdm(total=len(rules) * (1 + len(places)), disable=not progress, leave=False) as bar:
        for name, rule in rules.items():
            bar.set_postfix_str(f"{name}: vectors")
            made_of = list_tasks(rule, n_lists=n_lists, lengths=sizes, seed=seed)
            composer = _Composer(model, *_judged(model, made_of, template), settings, kinds)
            bar.update()
            for place in dict.fromkeys(places):
                target = f"{place} {name}"
                bar.set_postfix_str(target)
                found[target] = composer.outcomes(place)
                bar.update()
            made, heads[name] = composer.facts, composer.heads
    known = facts(model)
    data = dataset(found, vectors=kinds, layers=range(known.n_layers))
    note = collect(
        kind=Composition.kind, task=", ".join(rules), heads=heads, **vars(settings), n_lists=n_lists,
        lengths=list(sizes), **{k: made[k] for k in ("template", "bos")}, model=known.name,
        n_layers=known.n_layers, model_facts=known.to_dict(),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Composition(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _judged(
    model: Any, tasks: Mapping[str, Task], template: str | Template
) -> tuple[dict[str, Task], Template]:
    """Keep the lists that can be judged in every task, and settle on one way to write them all.

    A prediction is judged by its first token, which must not be right in two tasks. Tasks with the same
    answers, because the rule changes none, cannot be told apart.
    """
    encoder = Encoder.of(model)
    settled = settle(tasks["last_rule"], get_template(template), encoder)
    ids = {name: first_tokens(task, settled, encoder).ids for name, task in tasks.items()}
    apart = [(a, b) for a, b in combinations(tasks, 2) if tasks[a].answers != tasks[b].answers]
    usable = [
        frozenset(usable_items(task, model, template=settled, answers="any"))
        for task in tasks.values()
    ]
    kept = [
        x
        for x in tasks["last_rule"].inputs
        if all(x in some for some in usable)
        and all(set(ids[a][x]).isdisjoint(ids[b][x]) for a, b in apart)
    ]
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} of {len(tasks['last_rule'])} lists have first tokens that tell the tasks apart "
            "with this tokenizer. Ask for more lists, another rule or another template."
        )
    return {
        name: replace(task, answers={x: task.answers[x] for x in kept})
        for name, task in tasks.items()
    }, settled


class _Composer:
    """One rule: its prompts, vectors and outcomes."""

    def __init__(
        self,
        model: Any,
        tasks: Mapping[str, Task],
        template: Template,
        settings: _Settings,
        kinds: Sequence[str],
    ) -> None:
        self.model, self.tasks, self.settings, self.kinds = model, tasks, settings, kinds
        self.how: dict[str, Any] = {
            "template": template, "answers": "any", "seed": settings.seed, "demonstrations": "split",
        }  # fmt: skip
        self.heads: dict[str, list[list[int]]] = {}
        read = {name: self._read(name) for name in tasks}
        self.thetas = {name: theta for name, (theta, _) in read.items()}
        self.outputs = {name: each for name, (_, each) in read.items()}
        self.effects = {
            name: self._effects(name) for name in (tasks if "function_vector" in kinds else ())
        }
        shown: dict[str, Any] = {"shots": settings.shots, "n_dummy": 0, "split": "test", **self.how}
        self.asked = {
            name: build_prompts(task, model, n=settings.n_test, **shown)
            for name, task in tasks.items()
        }
        self.facts = self.asked["last"].facts

    def vectors(self, kind: str, place: str) -> dict[str, TaskVector]:
        """Give the vectors of the four corners, the composed one, and random ones."""
        at = PLACES[place]
        if kind == "theta":
            made = {corner: self.thetas[name] for corner, name in at.items()}
            return self._composed(made, f"{place}:{kind}")
        heads = self._heads([at[part] for part in PARTS])
        self.heads[place] = [list(head) for head in heads]
        made = {c: function_vector(self.model, self.outputs[n], heads) for c, n in at.items()}
        return self._composed(made, f"{place}:{kind}")

    def _composed(self, made: Mapping[str, TaskVector], which: str) -> dict[str, TaskVector]:
        # The difference first: where a rule does nothing it is exactly zero.
        composed = made["bc"] + (made["ad"] - made["ac"])
        n = max(self.settings.n_dev, self.settings.n_test)
        wide = repeat(composed.values, "1 layer d_model -> prompt layer d_model", prompt=n)
        stream = f"{self.settings.seed}:{self.tasks['last'].name}:{which}"
        drawn = replace(composed, values=wide).random_like(
            seed=random.Random(stream).getrandbits(32)
        )
        parts = {part: made[part] for part in PARTS}
        return {"composed": composed, "direct": made["bd"], **parts, "random": drawn}

    def _read(self, name: str) -> tuple[TaskVector, Float[Tensor, "layer head d_head"]]:
        """Mean theta, and mean outputs of the heads, in one run that shares the demonstrations."""
        s, model = self.settings, self.model
        shown: dict[str, Any] = {"shots": s.shots, "split": "dev", **self.how}
        made = build_prompts(self.tasks[name], model, n=s.n_vectors, n_dummy=s.n_dummy, **shown)
        asked = dummy_requests(model, made)
        heads = Request(made.regular, reads=(Read("z", asked[0].reads[0].layers),))
        *read, regular = run(model, [*asked, heads])
        outputs = regular.activations[0][0].float().mean(dim=0)
        return average(model, made, asked, read).mean(), outputs

    def _effects(self, name: str) -> Float[Tensor, "layer head"]:
        """Mean effect of every head on prompts with shuffled labels."""
        s = self.settings
        shuffled = build_prompts(
            self.tasks[name], self.model, shots=s.shots, n=s.n_trials, n_dummy=0, split="dev",
            labels="shuffled", **self.how,
        )  # fmt: skip
        effect = indirect_effects(self.model, shuffled, self.outputs[name]).effect
        return reduce(effect, "layer head trial -> layer head", "mean")

    def _heads(self, parts: Sequence[str]) -> list[tuple[int, int]]:
        """Choose the heads with the largest mean effect on the parts; the composed task has no say."""
        mean = torch.stack([self.effects[part] for part in parts]).mean(dim=0)
        if not 1 <= self.settings.n_heads <= mean.numel():
            raise ValueError(
                f"n_heads = {self.settings.n_heads} asked for; this model has 1 to {mean.numel()} heads."
            )
        best = mean.flatten().topk(self.settings.n_heads).indices.tolist()
        return [divmod(i, mean.shape[1]) for i in best]

    def outcomes(self, place: str) -> dict[str, Any]:
        """Choose each vector's layer on dev, then see what it does to test queries."""
        n_layers, name = facts(self.model).n_layers, PLACES[place]["bd"]
        bare: dict[str, Any] = {"shots": 0, "n_dummy": 0, "split": "dev", **self.how}
        dev = build_prompts(self.tasks[name], self.model, n=self.settings.n_dev, **bare)
        test = self.asked[name]
        own = {kind: self.vectors(kind, place) for kind in self.kinds}
        every = [(kind, own[kind][name]) for kind in own for name in RUNS]
        cells = tuple(
            _edit(kind, vector, layer, len(dev))
            for kind, vector in every
            for layer in range(n_layers)
        )
        right = self._predicted(dev, dev.zero_shot, cells)
        share = reduce(right[1].astype(float), "cell prompt -> cell", "mean")
        by_layer = rearrange(share, "(v r l) -> v r l", v=len(own), l=n_layers)
        best = by_layer.argmax(axis=-1)
        chosen = [
            _edit(kind, vector, int(layer), len(test))
            for (kind, vector), layer in zip(every, best.ravel(), strict=True)
        ]
        token, _ = self._predicted(test, test.zero_shot, ((), *chosen))
        shown, _ = self._predicted(test, test.regular, ((),))
        said = rearrange(self._says(token[1:], place), "(v r) p c -> v r p c", v=len(own))
        norms = [
            float(v.at(int(i)).norm(dim=-1)[0])
            for (_, v), i in zip(every, best.ravel(), strict=True)
        ]
        decode = self.model.tokenizer.decode
        words = {int(i): decode([int(i)]) for i in np.unique(token)}
        spoken = np.vectorize(words.__getitem__, otypes=[object])(token[1:])
        return {
            "says": said,
            "says_baseline": self._says(token[:1], place)[0],
            "says_regular": self._says(shown, place)[0],
            "dev": by_layer,
            "layer_chosen": best,
            "norm": np.array(norms).reshape(best.shape),
            "token": rearrange(spoken, "(v r) p -> v r p", v=len(own)),
            "query": list(test.queries),
        }

    def _predicted(self, prompts: Prompts, batch: Any, cells: Any) -> tuple[np.ndarray, np.ndarray]:
        """Predicted tokens, and whether they are right, by cell and prompt."""
        request = Request(batch, cells=cells, readout=FirstToken(prompts.answer_ids))
        (found,) = run(self.model, [request])
        return tuple(found.values[name].cpu().numpy() for name in ("predicted", "correct"))  # pyright: ignore

    def _says(self, token: np.ndarray, place: str) -> np.ndarray:
        """Whether each prediction is right for the query at each corner."""
        found = np.zeros((*token.shape, len(CORNERS)), dtype=bool)
        for j, corner in enumerate(CORNERS):
            for i, ids in enumerate(self.asked[PLACES[place][corner]].answer_ids):
                found[:, i, j] = np.isin(token[:, i], ids)
        return found


def _edit(kind: str, vector: TaskVector, layer: int, n: int) -> tuple[Edit, ...]:
    """Theta stands in for the residual stream, a function vector is added to it."""
    values = vector.at(layer)
    some = values[:n] if len(values) > 1 else values
    mode = "replace" if kind == "theta" else "add"
    return (Edit(vector.site, layer, torch.as_tensor(some), mode=mode),)
