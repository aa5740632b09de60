"""Links from source pages back to the reference, mended.

Sphinx's viewcode takes it that all of a module is documented below one name. Here ``score`` is
``tvlens.score`` and its ``Scores`` is ``tvlens.scoring.Scores``, so that some links lose their anchor.
"""

import re
from typing import Any

_BACK = re.compile(r'(class="viewcode-back" href=")[^"#]*#([^"]+)"')


def _mend(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    if not page.startswith("_modules/") or "body" not in context:
        return
    known = app.env.get_domain("py").objects
    module = page.removeprefix("_modules/").replace("/", ".")

    def mended(link: re.Match[str]) -> str:
        name = documented(link[2], module, known)
        if name is None:
            return link[0]
        place = app.builder.get_relative_uri(page, known[name].docname)
        return f'{link[1]}{place}#{known[name].node_id}"'

    context["body"] = _BACK.sub(mended, context["body"])


def documented(anchor: str, module: str, known: Any) -> str | None:
    """Find the name below which something in a module is documented.

    Args:
        anchor: The name that viewcode takes it for, e.g. ``tvlens.Scores.interval``.
        module: Where it is defined, e.g. ``tvlens.scoring``.
        known: All documented names.

    Returns:
        The name: the anchor, or with the module or a package around it before its last parts.
    """
    if anchor in known:
        return anchor
    parts, around = anchor.split("."), module.split(".")
    for cut in range(1, len(parts)):
        for depth in range(len(around), 0, -1):
            name = ".".join([*around[:depth], *parts[cut:]])
            if name in known:
                return name
    return None


def setup(app: Any) -> dict[str, Any]:
    """Tell Sphinx."""
    app.connect("html-page-context", _mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
