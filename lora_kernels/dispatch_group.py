"""Which way a group takes: one launch for all of its members, or member by member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_kernels.autograd_group import Plan
from lora_kernels.dispatch import Choice


@dataclass(frozen=True)
class GroupChoice:
    """Which way a group takes, and why: `reason` says why it goes member by member, None where it does not."""

    choices: tuple[Choice, ...]
    plan: Plan
    reason: str | None

    def __str__(self) -> str:
        lines = [self._way()]
        for i, choice in enumerate(self.choices):
            lines += [f"members[{i}]", *(f"  {line}" for line in str(choice).splitlines())]
        return "\n".join(lines)

    def _way(self) -> str:
        if self.plan.group is None:
            return f"member by member: {self.reason}"
        way = f"as one group on {self.choices[0].backend.name}"
        note = self.plan.group.describe([choice.problem for choice in self.choices])
        return way if note is None else f"{way}; {note}"


# By the identities of the members' choices, which the entries keep alive.
_group_choices: dict[tuple[int, ...], GroupChoice] = {}


def group_choice(choices: Sequence[Choice]) -> GroupChoice:
    """Whether members with these choices go as one group."""
    key = tuple(map(id, choices))
    found = _group_choices.get(key)
    if found is None:
        found = _group_choices[key] = _choose_group(tuple(choices))
    return found


def _choose_group(choices: tuple[Choice, ...]) -> GroupChoice:
    backends = tuple(choice.backend for choice in choices)
    precisions = tuple(choice.problem.precision for choice in choices)
    first, names = backends[0], {backend.name for backend in backends}
    if len(choices) == 1:
        reason: str | None = "it has one member"
    elif len(names) > 1:
        reason = f"its members run on different backends: {', '.join(sorted(names))}"
    elif len(set(precisions)) > 1:
        reason = "the adapters of its members differ in dtype"
    elif first.group is None:
        reason = f"{first.name} has no functions on groups"
    else:
        reason = first.group.refuses([choice.problem for choice in choices])
    # Of an automatic choice, the records of NF4 weights may know of more than those of dense ones.
    group = next((choice.backend.group for choice in choices if choice.problem.nf4), first.group)
    return GroupChoice(choices, Plan(group if reason is None else None, backends, precisions), reason)
