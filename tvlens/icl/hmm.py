"""A mixture of hidden Markov models, and the predictor that nothing can beat on it.

Every document is written by one of a few hidden Markov models, its *concept*. A hidden state is a pair of a
value and a slot; a table that all concepts share says which token the pair writes. Concepts differ in how
slots follow one another. A prompt of examples that are separated by a delimiter is no such document, and
still names its concept, if all examples come from the same one: whoever keeps a posterior over concepts
learns in context.

The exact predictor does so: the forward algorithm gives the likelihood of what was read under each
concept, and what comes next under each; Bayes' rule weighs them.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.icl.draws import generator
from tvlens.icl.presets import at_least, within

DELIMITER = 0
"""The token of slot 0, whatever the value."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Hidden Markov models over the same states and tokens, equally likely a priori.

    Args:
        start: Probability of each first state; rows sum to 1.
        transition: From state to state; rows sum to 1.
        emission: From state to token; rows sum to 1.
    """

    start: Float[Tensor, "concept state"]
    transition: Float[Tensor, "concept state next"]
    emission: Float[Tensor, "state token"]

    @property
    def n_concepts(self) -> int:
        """How many models are mixed."""
        return len(self.start)

    def to(self, device: str | torch.device) -> "Mixture":
        """Give the same on a device.

        Args:
            device: The device.

        Returns:
            The mixture there.
        """
        return Mixture(*(x.to(device) for x in (self.start, self.transition, self.emission)))

    def only(self, concept: Int[Tensor, " item"]) -> "Mixture":
        """Give some of the models.

        Args:
            concept: Which.

        Returns:
            A mixture of these.
        """
        return Mixture(self.start[concept], self.transition[concept], self.emission)


def ginc(
    *,
    n_concepts: int = 5,
    n_values: int = 5,
    n_slots: int = 5,
    n_tokens: int = 20,
    temperature: float = 0.1,
    identity: float = 0.9,
    floor: float = 0.05,
    seed: int = 0,
) -> Mixture:
    """Make a mixture as the GINC data set does; the authors' has 10 values, 10 slots, 50 tokens.

    Args:
        n_concepts: How many models.
        n_values: Values of a state.
        n_slots: Slots of a state; slot 0 writes the delimiter.
        n_tokens: Tokens, the delimiter being one.
        temperature: A matrix of transitions is a mixture of random permutations, whose weights are a
            softmax of uniform numbers with this temperature: small ones make one permutation the
            likeliest.
        identity: Probability of keeping the value, beside what the permutations say.
        floor: Share of uniform transitions between slots. The authors have none; with it every prompt has a
            likelihood above 0 under every concept.
        seed: Seed of the draws.

    Returns:
        The mixture in float64. Transitions between values are the same in all concepts.

    Raises:
        ValueError: A size is too small, or a share lies outside 0 to 1.

    Example:
        >>> ginc().transition.shape
        torch.Size([5, 25, 25])

    References:
        Xie et al. 2022, An Explanation of In-context Learning as Implicit Bayesian Inference, arXiv
        2111.02080.
    """
    at_least(1, n_concepts=n_concepts, n_values=n_values)
    at_least(2, n_slots=n_slots, n_tokens=n_tokens)
    within(0, 1, identity=identity, floor=floor)
    within(1e-3, float("inf"), temperature=temperature)
    stream = generator(seed, "ginc")
    values = _permutations(1, n_values, temperature, stream)[0]
    values = identity * torch.eye(n_values, dtype=torch.float64) + (1 - identity) * values
    slots = (1 - floor) * _permutations(n_concepts, n_slots, temperature, stream) + floor / n_slots
    transition = torch.einsum("vw,cst->cvswt", values, slots)
    start = torch.rand(n_concepts, n_values * n_slots, generator=stream, dtype=torch.float64)
    tokens = torch.randint(1, n_tokens, (n_values, n_slots), generator=stream)
    tokens[:, 0] = DELIMITER
    return Mixture(
        # The authors' temperature of 10: all states nearly as likely to begin with.
        (start / 10).softmax(dim=-1),
        rearrange(transition, "c v s w t -> c (v s) (w t)"),
        torch.eye(n_tokens, dtype=torch.float64)[tokens.flatten()],
    )


def _permutations(
    n: int, size: int, temperature: float, stream: torch.Generator
) -> Float[Tensor, "concept state next"]:
    """Mixtures of as many random permutations as there are states."""
    weights = torch.rand(n, size, generator=stream, dtype=torch.float64) / temperature
    order = torch.rand(n, size, size, generator=stream).argsort(dim=-1)
    matrices = torch.eye(size, dtype=torch.float64)[order]
    return torch.einsum("cp,cpst->cst", weights.softmax(dim=-1), matrices)


def sample(
    mixture: Mixture,
    concept: Int[Tensor, " item"],
    length: int,
    stream: torch.Generator,
    *,
    first: Int[Tensor, " item"] | None = None,
) -> tuple[Int[Tensor, "item position"], Int[Tensor, "item position"]]:
    """Let concepts write documents.

    Args:
        mixture: The mixture, on the CPU.
        concept: Who writes each.
        length: Tokens in a document.
        stream: Where randomness comes from.
        first: First states; drawn where None.

    Returns:
        Tokens and hidden states.

    Example:
        >>> from tvlens.icl.draws import generator
        >>> sample(ginc(), torch.tensor([0, 1]), 4, generator(0))[0].shape
        torch.Size([2, 4])
    """
    rows = mixture.transition.cumsum(dim=-1)
    u = torch.rand(length + 1, len(concept), 1, generator=stream, dtype=torch.float64)
    state = _drawn(mixture.start[concept].cumsum(dim=-1), u[0]) if first is None else first
    states = [state]
    for position in range(1, length):
        states.append(_drawn(rows[concept, states[-1]], u[position]))
    hidden = torch.stack(states, dim=1)
    return mixture.emission.argmax(dim=-1)[hidden], hidden


def _drawn(cumulated: Tensor, u: Tensor) -> Tensor:
    # Rounding may leave the last sum below 1.
    return torch.searchsorted(cumulated, u).squeeze(-1).clamp_max(cumulated.shape[-1] - 1)


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts of examples that one concept wrote.

    Args:
        tokens: Examples with delimiters between, then the beginning of one more, whose last token is asked
            for.
        answer: The likeliest last token to one who knows the concept and the slot in which examples begin.
        concept: The concept.
    """

    tokens: Int[Tensor, "item position"]
    answer: Int[Tensor, " item"]
    concept: Int[Tensor, " item"]


def prompts(
    mixture: Mixture, n: int, *, examples: int, length: int, n_slots: int, seed: int = 0
) -> Examples:
    """Make prompts: independent examples of one concept, all of which begin in the same slot.

    Args:
        mixture: The mixture, on the CPU.
        n: How many prompts.
        examples: Whole examples before the last one.
        length: Tokens in an example.
        n_slots: Slots of a state.
        seed: Seed of the draws; the concepts and slots do not depend on ``examples``.

    Returns:
        The prompts.

    Raises:
        ValueError: An example has fewer than two tokens, or the number of examples is negative.

    Example:
        >>> prompts(ginc(), 3, examples=2, length=3, n_slots=5).tokens.shape
        torch.Size([3, 10])

    References:
        Xie et al. 2022, arXiv 2111.02080.
    """
    at_least(2, length=length)
    at_least(0, examples=examples)
    stream = generator(seed, "prompts", length)
    n_values = mixture.start.shape[1] // n_slots
    concept = torch.randint(mixture.n_concepts, (n,), generator=stream)
    slot = torch.randint(1, n_slots, (n,), generator=stream)
    parts: list[Tensor] = []
    delimiter = torch.full((n, 1), DELIMITER)
    # The one that is asked for is drawn first, so that every number of examples asks the same.
    drawn = []
    for _ in range(examples + 1):
        value = torch.randint(n_values, (n,), generator=stream)
        tokens, _ = sample(mixture, concept, length, stream, first=value * n_slots + slot)
        drawn.append(tokens)
    for tokens in drawn[1:]:
        parts += [tokens, delimiter]
    asked = drawn[0][:, :-1]
    begin = repeat(
        torch.eye(n_slots, dtype=torch.float64)[slot] / n_values, "item slot -> item (v slot)", v=n_values
    )  # fmt: skip
    known = mixture.only(concept)
    truth = Mixture(begin, known.transition, known.emission)
    log_next = each_concept(truth, asked, own=True)[1][:, 0]
    return Examples(torch.cat([*parts, asked], dim=1), log_next.argmax(dim=-1), concept)


def each_concept(
    mixture: Mixture, tokens: Int[Tensor, "item position"], *, own: bool = False
) -> tuple[Float[Tensor, "item concept"], Float[Tensor, "item concept token"]]:
    """Read tokens with every concept, by the forward algorithm in log space.

    Args:
        mixture: The mixture.
        tokens: What is read.
        own: Item i is read by concept i alone, and the axis ``concept`` has size 1.

    Returns:
        Log likelihood of the tokens under each concept, and log probabilities of the next token.

    Example:
        >>> log_likelihood, log_next = each_concept(ginc(), torch.tensor([[0]]))
        >>> log_next.exp().sum(-1).allclose(torch.ones(1, 5, dtype=torch.float64))
        True
    """
    *_, last = _forward(mixture, tokens, own=own)
    return last


def _forward(mixture: Mixture, tokens: Tensor, *, own: bool = False):
    """Yield log likelihoods and log probabilities of the next token after every position."""
    log_emission = mixture.emission.log()
    rule = "i c s, i s t -> i c t" if own else "i c s, c s t -> i c t"
    ahead = rearrange(mixture.start, "i s -> i 1 s" if own else "c s -> 1 c s").log()
    for position in range(tokens.shape[1]):
        seen = rearrange(log_emission[:, tokens[:, position]], "s i -> i 1 s")
        alpha = ahead + seen
        likelihood = alpha.logsumexp(dim=-1)
        top = alpha.amax(dim=-1, keepdim=True)
        # Impossible so far: no state is left, and nothing can come next.
        top = torch.where(top.isfinite(), top, 0)
        ahead = torch.einsum(rule, (alpha - top).exp(), mixture.transition).log() + top
        weights = (ahead - likelihood.unsqueeze(-1)).exp()
        yield likelihood, (weights @ mixture.emission).log()


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the exact predictor says after every position.

    Args:
        log_next: Log probabilities of the next token, concepts weighed by the posterior.
        log_next_prior: The same, weighed by the prior for ever: one who never infers the concept.
        log_posterior: Log probability of each concept.
        log_next_each: Log probabilities of the next token under each concept.
    """

    log_next: Float[Tensor, "item position token"]
    log_next_prior: Float[Tensor, "item position token"]
    log_posterior: Float[Tensor, "item position concept"]
    log_next_each: Float[Tensor, "item position concept token"]


def bayes(mixture: Mixture, tokens: Int[Tensor, "item position"]) -> Prediction:
    """Predict exactly: a posterior over concepts, and what each says comes next.

    Args:
        mixture: The mixture; its concepts are equally likely a priori.
        tokens: What is read, on the same device.

    Returns:
        The predictions after every position, in the mixture's dtype.

    Raises:
        ValueError: A token does not exist, or nothing was read.

    Example:
        >>> found = bayes(ginc(), torch.tensor([[3, 0, 2]]))
        >>> found.log_next.shape
        torch.Size([1, 3, 20])

    References:
        Xie et al. 2022, arXiv 2111.02080.
    """
    n_tokens = mixture.emission.shape[1]
    if not tokens.numel():
        raise ValueError("the predictor reads at least one token; none arrived.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < n_tokens:
        raise ValueError(
            f"tokens must lie in 0 to {n_tokens - 1}; {int(tokens.min())} to {int(tokens.max())} arrived."
        )
    likelihood, each = (torch.stack(x, dim=1) for x in zip(*_forward(mixture, tokens), strict=True))
    posterior = likelihood.log_softmax(dim=-1)
    weighed = (rearrange(posterior, "i p c -> i p c 1") + each).logsumexp(dim=2)
    prior = reduce(each.exp(), "i p c t -> i p t", "mean").log()
    return Prediction(weighed, prior, posterior, each)
