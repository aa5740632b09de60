"""What `check_model` found."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


class ModelCheck(Result):
    """Outcomes of the checks of one model, by ``check``."""

    kind: ClassVar[str] = "check"
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        name: ("check",)
        for name in ("status", "measured", "tolerance", "seconds", "what", "note", "means")
    }
    table: ClassVar[tuple[str, ...]] = ("status", "measured", "tolerance", "note")
    method: ClassVar[str] = (
        "Each check measures one number on a few short prompts and compares it with a tolerance that "
        "depends on the type of the weights. A check that raises an error has failed; one that rests on a "
        "check that did not pass is skipped."
    )

    @property
    def title(self) -> str:
        """Which model was checked."""
        return f"Checks of {self.provenance['model']}"

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.of("failed")

    def of(self, status: str) -> tuple[str, ...]:
        """Name the checks that passed, failed or were skipped.

        Args:
            status: ``"passed"``, ``"failed"`` or ``"skipped"``.

        Returns:
            Their names, in the order in which they ran.

        Raises:
            ValueError: There is no such status.

        Example:
            >>> result.of("failed")  # doctest: +SKIP
        """
        from tvlens._errors import unknown
        from tvlens.checking.table import STATES

        if status not in STATES:
            raise unknown("status", status, STATES)
        pairs = zip(self.data["check"].values, self.data["status"].values, strict=True)
        return tuple(str(name) for name, state in pairs if state == status)

    def finding(self) -> str:
        """How many checks passed, and what the first failure means."""
        failed, skipped = self.of("failed"), self.of("skipped")
        ran = self.data.sizes["check"] - len(skipped)
        left = f"; {len(skipped)} skipped" if skipped else ""
        if not failed:
            return f"{ran} of {ran} checks of {self.provenance['model']} passed{left}."
        means = str(self.data["means"].sel(check=failed[0]).values).rstrip(".")
        named = ", ".join(failed)
        of = f"{ran - len(failed)} of {ran} checks of {self.provenance['model']} passed{left}"
        return f"{of}; failed: {named}. {means}."

    def summary(self) -> dict[str, Any]:
        """Counts, the names of what failed, and every number with its tolerance."""
        rows = self.data[list(self.variables)].to_dataframe().reset_index()
        frame = rows.astype(object).where(rows.notna(), None)
        return {
            "kind": self.kind,
            "title": self.title,
            "model": self.provenance["model"],
            "finding": self.finding(),
            "passed": self.passed,
            "failed": list(self.of("failed")),
            "skipped": list(self.of("skipped")),
            "seconds": self.provenance["seconds"],
            "checks": frame.to_dict(orient="records"),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """All checks with their numbers; and what failures mean, where there are any."""
        from tvlens.plots.checking import number

        columns = {"check": [str(name) for name in self.data["check"].values]}
        for name in self.table:
            values = self.data[name].values.tolist()
            columns[name] = [number(v) if isinstance(v, float) else str(v) for v in values]
        frame = pd.DataFrame(columns)
        found = {"Checks": frame}
        failed = list(self.of("failed"))
        if failed:
            rows = self.data.sel(check=failed)
            said = {name: rows[name].values.tolist() for name in ("check", "what", "means")}
            found["What failed"] = pd.DataFrame(said)
        return found

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw how much of its tolerance each check used; see `tvlens.plots.checking.check_dots`."""
        from tvlens.plots.checking import check_dots

        return check_dots(self.data.assign_attrs(finding=self.finding()), **channels)
