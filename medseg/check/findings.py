"""The problems of one case, gathered while it is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medseg.schema.check import Problem


@dataclass(slots=True)
class Findings:
    """Problems of one case, in the order they were found."""

    case_id: str
    problems: list[Problem] = field(default_factory=list)

    def error(self, code: str, message: str, *, file: str | None = None, fix: str = "") -> None:
        """Add something that makes the case unusable.

        Args:
            code: Short name of the kind of problem.
            message: What, where, found, expected, what to do.
            file: File, relative to the dataset's folder.
            fix: What `--fix` does about it; empty where no correction is safe.
        """
        self._add("error", code, message, file, fix)

    def warning(self, code: str, message: str, *, file: str | None = None, fix: str = "") -> None:
        """Add something a person should look at; see `error`."""
        self._add("warning", code, message, file, fix)

    @property
    def has_errors(self) -> bool:
        """Return whether the case cannot be used as it is."""
        return any(problem.level == "error" for problem in self.problems)

    def _add(
        self,
        level: Literal["error", "warning"],
        code: str,
        message: str,
        file: str | None,
        fix: str,
    ) -> None:
        self.problems.append(
            Problem(
                code=code,
                level=level,
                message=message,
                case=self.case_id,
                file=file,
                fix=fix or None,
            )
        )
