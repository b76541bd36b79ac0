"""What a check finds: where in the scenario, and what is wrong there."""

Path = tuple[str | int, ...]
Rule = tuple[Path, str]
