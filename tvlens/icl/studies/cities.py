"""Names and cities by heart: does a model still read in its context what its weights say otherwise?

SmolLM2 is fine-tuned on bare questions, name by name, until it knows where everyone lives. Then a
sentence before the question says that someone lives elsewhere. Before fine-tuning the model follows that
sentence; the matrix over names and stated cities of log p(stated) - log p(memorised) says how far it
still does, checkpoint by checkpoint. Names that were never trained, prose and other tasks tell a loss of
reading from a loss of everything. At the end values and weights of the two models are exchanged, to see
where the change sits.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import Encoder
from tvlens.icl._state import State, load_state, save_state
from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.studies import study
from tvlens.icl.studies._cities import ARMS, Cities, dataset
from tvlens.icl.studies._cities_data import (
    GROUP,
    QUESTION,
    WORDINGS,
    Pairs,
    prompts,
    question,
    told,
)
from tvlens.icl.studies._cities_scoring import corpus_loss, score_candidates
from tvlens.icl.studies._cities_training import copied, finetune, holding, lessons
from tvlens.icl.studies._cities_where import (
    DIRECTIONS,
    HOWS,
    PLACES,
    Conflicts,
    deltas,
    grafted,
    n_ticks,
    parts,
    patched,
)
from tvlens.models import facts, load_model
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.scoring import score
from tvlens.sites import check_layers

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "arms": ("adamw",), "n_groups": 0, "n_controls": 1, "steps": 10, "checkpoints": (0, 10), "lr": 1e-4,
        "sgd_lr": 1e-4, "wordings": ("same", "other"), "n_windows": 1, "tasks": (), "n_where": 8,
        "n_contexts": 1, "layers": (0, 10, 20, 29), "width": 10,
    },
    "paper": {
        "arms": ARMS, "n_groups": 6, "n_controls": 2, "steps": 150, "lr": 1e-4, "sgd_lr": 1e-4,
        "checkpoints": (0, 5, 10, 20, 40, 80, 150), "wordings": tuple(WORDINGS), "n_windows": 16,
        "tasks": ("country_capital", "to_upper"), "n_where": None, "n_contexts": 3, "layers": None,
        "width": 5,
    },
}  # fmt: skip


@study("cities")
def cities(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    model: Any = "smollm2-135m",
    arms: str | Sequence[str] | None = None,
    n_groups: int | None = None,
    n_controls: int | None = None,
    steps: int | None = None,
    checkpoints: int | Sequence[int] | None = None,
    lr: float | None = None,
    sgd_lr: float | None = None,
    wordings: str | Sequence[str] | None = None,
    n_windows: int | None = None,
    tasks: Sequence[str] | None = None,
    n_where: int | None = None,
    n_contexts: int | None = None,
    layers: int | Sequence[int] | None = None,
    width: int | None = None,
) -> Cities:
    """Fine-tune a language model on where people live, and tell it otherwise.

    Args:
        preset: ``"quick"``: the authors' eight pairs on two CPU cores. ``"paper"``: 56 pairs and 16 untouched
            ones, meant for a GPU.
        seed: Decides what is drawn in training, and the random weights of a control.
        progress: Whether to show a progress bar.
        device: Where to run, if the model is named; tvlens' default where None.
        out: A folder in which each finished arm is saved; what is there is not run again.
        model: A HookedTransformer, which gets its weights back, or a name that `tvlens.load_model` knows.
        arms: ``"adamw"``, full batches; ``"sgd"``, one question a step as in the authors' sketch;
            ``"rehearsed"``, as adamw, but each step also tells every name an untouched pair's city and asks
            for that. None, here and below, for what the preset says.
        n_groups: Of our own groups of eight pairs, how many are trained besides the authors'.
        n_controls: Groups that are never trained.
        steps: Steps of each arm.
        checkpoints: Steps at which everything is measured; the last one always is.
        lr: Step size of AdamW.
        sgd_lr: Step size of SGD.
        wordings: How the sentence is put that states another city: ``"same"``, with the question's words, so
            that copying what followed them is enough; ``"other"``, without.
        n_windows: Pieces of 128 tokens of prose on which forgetting is measured.
        tasks: Tasks whose accuracy with five demonstrations is followed, too.
        n_where: Names that are patched, spread over all; all of them where the preset says so.
        n_contexts: Cities stated to each of these.
        layers: Layers that are patched.
        width: Layers that are grafted together.

    Returns:
        Log probabilities by arm, checkpoint, name and stated city, and effects of patches and grafts, as a
        result that draws itself.

    Raises:
        ValueError: A preset, arm or wording that does not exist, more groups than there are, rehearsal
            without untouched pairs, or a folder with another run.
        TypeError: The model is no HookedTransformer.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> few = {"steps": 1, "checkpoints": 0, "n_controls": 0, "n_where": 1, "layers": 0, "width": 4}
        >>> found = cities(model=tiny_model(), wordings="same", progress=False, **few)
        >>> found.data["log_prob_stated"].dims
        ('arm', 'step', 'wording', 'name', 'context')

    References:
        Chan, Chen, Gyorgy, Schuurmans 2025, Toward understanding in-context vs. in-weight learning,
        arXiv 2410.23042, the experiment on a language model.
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in PRESETS["quick"]}
    used = settle(PRESETS, preset, **given)
    used = _checked(used, seed)
    model = load_model(model, device=device) if isinstance(model, str) else model
    used["layers"] = _layers(model, used["layers"], named=layers is not None)
    pairs = Pairs.load(Encoder.of(model), n_groups=used["n_groups"], n_controls=used["n_controls"])
    run = _Run(model, pairs, used, seed)
    mark = {"study": "cities", "seed": seed, "model": facts(model).name} | used
    found = run.all(Path(out) if out else None, mark, progress)
    data = dataset(found, pairs=pairs, used=used, parts=[*parts(model, used["width"]), "noise"])
    note = collect(
        kind=Cities.kind, preset=preset, seed=seed, **facts(model).origin, device=facts(model).device,
        question=QUESTION, **used,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Cities(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _checked(used: dict[str, Any], seed: int) -> dict[str, Any]:
    used = used | {name: several(name, used[name]) for name in ("arms", "wordings", "checkpoints")}
    for name, valid in (("arm", ARMS), ("wording", tuple(WORDINGS))):
        for value in used[f"{name}s"]:
            if value not in valid:
                raise unknown(name, value, valid)
    at_least(0, seed=seed, n_groups=used["n_groups"], n_controls=used["n_controls"])
    at_least(1, steps=used["steps"], n_windows=used["n_windows"], width=used["width"])
    within(0, float("inf"), lr=used["lr"], sgd_lr=used["sgd_lr"])
    at_least(1, n_contexts=used["n_contexts"])
    within(1, GROUP - 1, n_contexts=used["n_contexts"])
    if used["n_where"] is not None:
        at_least(1, n_where=used["n_where"])
    for step in used["checkpoints"]:
        at_least(0, checkpoints=step)
        if step > used["steps"]:
            raise ValueError(
                f"a checkpoint at step {step} of {used['steps']}. Nearest: {used['steps']}."
            )
    if "rehearsed" in used["arms"] and not used["n_controls"]:
        raise ValueError(
            "rehearsal states cities of untouched pairs, but n_controls = 0. Nearest: 1."
        )
    used["checkpoints"] = tuple(sorted({*used["checkpoints"], 0, used["steps"]}))
    used["tasks"] = tuple(used["tasks"])
    return used


def _layers(model: Any, layers: Any, *, named: bool) -> tuple[int, ...]:
    """The layers asked for; of a preset's, those that this model has."""
    from tvlens.models.hooked.convert import is_hooked

    if not is_hooked(model):
        raise TypeError(
            f"a HookedTransformer is needed, whose weights are trained; {type(model).__name__} arrived. "
            "Load one with load_model(..., backend='hooked')."
        )
    n = model.cfg.n_layers
    if not named and layers is not None:
        layers = [layer for layer in layers if layer < n]
    return check_layers(layers, n)


class _Run:
    """One study: its prompts, and what is measured of each arm."""

    def __init__(self, model: Any, pairs: Pairs, used: dict[str, Any], seed: int) -> None:
        self.model, self.pairs, self.used, self.seed = model, pairs, used, seed
        every = range(len(pairs))
        texts = [question(pairs.pairs[i].name) for i in every]
        rows = [*every]
        for wording in used["wordings"]:
            for i in every:
                texts += [told(pairs.pairs[i].name, city, wording) for city in pairs.candidates(i)]
                rows += [i] * GROUP
        self.batch = prompts(pairs.encoder, texts, [()] * len(texts))
        self.candidates = pairs.answer_sets(rows)
        self.tasks: list[Prompts] = [
            build_prompts(name, model, n=50, split="test", seed=seed) for name in used["tasks"]
        ]

    def all(
        self, out: Path | None, mark: dict[str, Any], progress: bool
    ) -> dict[str, dict[str, Tensor]]:
        """Run all arms, but for those that a folder has."""
        from tqdm.auto import tqdm

        arms, found = self.used["arms"], {}
        ticks = len(arms) * (self.used["steps"] + len(self.used["checkpoints"]))
        with tqdm(
            total=ticks + n_ticks(self.model, self.used["width"]), disable=not progress, leave=False
        ) as bar:
            for arm in arms:
                path = out / f"{arm}.safetensors" if out else None
                note = mark | {"arm": arm}
                if path and path.exists():
                    found[arm] = load_state(path, note, torch.device("cpu")).weights
                    continue
                found[arm] = self.arm(arm, bar.update, where=arm == arms[0])
                if path:
                    save_state(path, State(found[arm]), note)
        return found

    def arm(self, arm: str, tick: Any, *, where: bool) -> dict[str, Tensor]:
        """Train one arm and measure it; patch and graft at the end."""
        measured: list[dict[str, Tensor]] = []

        def measure(step: int) -> None:
            measured.append(self.measure() if step else self.start)
            tick()

        tuned = finetune(
            self.model, lesson=lessons(self.pairs, arm, self.seed), at=self.used["checkpoints"],
            optimizer="sgd" if arm == "sgd" else "adamw", measure=measure, step_done=tick,
            lr=self.used["sgd_lr" if arm == "sgd" else "lr"],
        )  # fmt: skip
        found = {name: torch.stack([one[name] for one in measured]) for name in measured[0]}
        return found | (self.where(tuned, tick) if where else {})

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """What the model does before any arm."""
        return self.measure()

    def measure(self) -> dict[str, Tensor]:
        """Say what the model does now."""
        n = len(self.pairs)
        likely, greedy = score_candidates(self.model, self.batch, self.candidates)
        said = likely.argmax(dim=1).to(torch.int8)
        written = torch.where(greedy.any(dim=1), greedy.int().argmax(dim=1), -1).to(torch.int8)
        # Bare questions first, then for each wording every name with the eight cities of its group.
        bare, after = likely[:n], likely[n:].reshape(-1, n, GROUP, GROUP)
        own = torch.arange(n) % GROUP
        shape = after.shape[:-1]
        retained = [corpus_loss(self.model, n_windows=self.used["n_windows"])]
        retained += [score(self.model, made).accuracy for made in self.tasks]
        return {
            "log_prob_stated": after.diagonal(dim1=-2, dim2=-1),
            "log_prob_memorised": after[:, torch.arange(n), :, own].transpose(0, 1),
            "said": said[n:].reshape(shape),
            "written": written[n:].reshape(shape),
            "bare_log_prob": bare[torch.arange(n), own],
            "bare_said": said[:n],
            "bare_written": written[:n],
            "retained": torch.tensor(retained),
        }

    def where(self, tuned: dict[str, Tensor], tick: Any) -> dict[str, Tensor]:
        """Patch and graft between the model as it came and as it ended."""
        used, n, base = self.used, len(self.pairs), copied(self.model)
        wanted = n if used["n_where"] is None else min(used["n_where"], n)
        rows = [i * n // wanted for i in range(wanted)]
        # Where both wordings are asked for, the one that copying does not answer.
        conflicts = Conflicts.of(
            self.pairs, rows, n_contexts=used["n_contexts"], wording=used["wordings"][-1]
        )
        clean = torch.stack([deltas(self.model, conflicts)[0].cpu()])
        with holding(self.model, tuned):
            clean = torch.cat([clean, deltas(self.model, conflicts).cpu()])
        effects = patched(self.model, base, tuned, conflicts, layers=used["layers"], tick=tick)
        grafts = grafted(
            self.model,
            base,
            tuned,
            conflicts,
            self.pairs,
            rows,
            width=used["width"],
            seed=self.seed,
            tick=tick,
        )
        recalled = torch.full((*grafts.recalled.shape[:2], n), torch.nan)
        recalled[..., rows] = grafts.recalled
        shape = len(DIRECTIONS), len(PLACES), len(used["layers"])
        return {
            "clean": conflicts.by_name(clean, n),
            "patched": conflicts.by_name(effects.flatten(0, 2), n).unflatten(0, shape),
            "grafted": conflicts.by_name(grafts.delta.flatten(0, 1), n).unflatten(
                0, (len(HOWS), len(grafts.parts))
            ),
            "recalled": recalled,
        }
