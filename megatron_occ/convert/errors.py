"""What goes wrong in a conversion; imports no torch."""

from __future__ import annotations


class FolderError(ValueError):
    """A folder that can't be converted; one line for each problem, with file and tensor."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))
