"""Templates: how a demonstration is written, and what every piece of a prompt is for.

The template decides more than it seems to: SmolLM2 carries the task in one vector with ``example:x->y`` and
hardly with ``x→y``. White space before an answer belongs to the answer, because tokenizers join it with the
word that follows.
"""

from dataclasses import dataclass
from enum import IntEnum

from tvlens._errors import needs, unknown


class Role(IntEnum):
    """What a token is for."""

    PAD = -1
    OTHER = 0
    BOS = 1
    DEMO_INPUT = 2
    DEMO_OUTPUT = 3
    SEPARATOR = 4
    QUERY = 5
    LAST = 6


@dataclass(frozen=True)
class Template:
    r"""How one demonstration is written; the query is the same text cut before ``{y}``.

    Attributes:
        demo: Text with one ``{x}`` and, after it, one ``{y}``.
        spacing: Whether inputs and outputs get a leading space where the template has none. ``"auto"``
            follows Hendel et al.: a space for natural-language tasks, where that leaves at least 70 % as many
            one-token answers as writing no space.

        lead: Where the white space between separator and answer goes: with the ``"answer"``, because most
            tokenizers join it to the word, or with the ``"prompt"``, for those that write it as a token of
            its own. `tvlens.encoding.settle` chooses.

    Example:
        >>> Template("{x} => {y}\n").query("high")
        ('high =>', ' ')
    """

    demo: str = "example:{x}->{y}\n"
    spacing: str = "auto"
    lead: str = "answer"

    def __post_init__(self) -> None:
        needs("a template", self.demo, str, "a text with {x} and {y}")
        at_x, at_y = self.demo.find("{x}"), self.demo.find("{y}")
        if self.demo.count("{x}") != 1 or self.demo.count("{y}") != 1 or at_x > at_y:
            raise ValueError(
                f"a template needs one {{x}} and, after it, one {{y}}; {self.demo!r} arrived. "
                "Example: 'Q: {x}\\nA: {y}\\n'."
            )
        if self.spacing not in ("auto", "always", "never"):
            raise unknown("spacing", self.spacing, ("auto", "always", "never"))
        if self.lead not in ("answer", "prompt"):
            raise unknown("lead", self.lead, ("answer", "prompt"))

    @property
    def pieces(self) -> tuple[str, str, str]:
        """The text before ``{x}``, between ``{x}`` and ``{y}``, and after ``{y}``, spaces included."""
        before, rest = self.demo.split("{x}")
        between, after = rest.split("{y}")
        return self._spaced(before), self._spaced(between), after

    def query(self, x: str) -> tuple[str, str]:
        """Write the query, and say what white space the answer starts with.

        Args:
            x: The query.

        Returns:
            The prompt text, and the answer's leading white space.
        """
        between = self.pieces[1]
        text = "".join(piece for piece, _ in self.query_segments(x))
        return text, "" if self.lead == "prompt" else between[len(between.rstrip()) :]

    def query_segments(self, x: str) -> list[tuple[str, Role]]:
        """Write the query as pieces of text with their roles."""
        before, between, _ = self.pieces
        last = between if self.lead == "prompt" else between.rstrip()
        return [(before, Role.OTHER), (x, Role.QUERY), (last, Role.SEPARATOR)]

    def demo_segments(self, x: str, y: str) -> list[tuple[str, Role]]:
        """Write one demonstration as pieces of text with their roles."""
        before, between, after = self.pieces
        return [
            (before, Role.OTHER),
            (x, Role.DEMO_INPUT),
            (between, Role.SEPARATOR),
            (y, Role.DEMO_OUTPUT),
            (after, Role.OTHER),
        ]

    def _spaced(self, text: str) -> str:
        """Add the leading space of the word that follows, unless there is white space already."""
        return text + " " if self.spacing == "always" and not text[-1:].isspace() else text


TEMPLATES: dict[str, Template] = {
    "example": Template(),
    "arrow": Template("{x}→{y}\n"),
    "qa": Template("Q: {x}\nA: {y}\n\n"),
}
DEFAULT_TEMPLATE = "example"


def get_template(template: str | Template) -> Template:
    r"""Resolve a built-in template's name, or a template written out with ``{x}`` and ``{y}``.

    Args:
        template: ``"example"``, ``"arrow"``, ``"qa"``, a text with ``{x}`` and ``{y}``, or a Template.

    Returns:
        The Template.

    Raises:
        ValueError: Neither a known name nor a text with both fields.

    Example:
        >>> get_template("arrow").demo
        '{x}→{y}\n'
    """
    if isinstance(template, Template):
        return template
    needs(
        "template",
        template,
        str,
        f"one of {', '.join(TEMPLATES)}, a text with {{x}} and {{y}}, or a Template",
    )
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template:
        return Template(template.replace("\\n", "\n"))
    raise unknown("template", template, TEMPLATES, hint="Or write one out: 'Q: {x}\\nA: {y}\\n'.")
