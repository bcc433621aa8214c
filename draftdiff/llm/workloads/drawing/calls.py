"""Answers as data: a JSON list of calls, checked against the table and turned into operation chains. Nothing is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from draftdiff.errors import UserError
from draftdiff.llm.workloads.drawing.tools import TOOLS, Ref, Tool

MOST_CALLS = 256


class NotExecutable(UserError):
    """What is wrong with an answer that could not run as a program."""


@dataclass(frozen=True)
class Call:
    """tool: from the table.  literals: values as they were written.  source: number of the call whose result it takes,
    from 0."""

    tool: Tool
    literals: dict[str, Any]
    source: int | None

    @property
    def valid(self) -> bool:
        """Whether every value is one that its parameter allows."""
        return all(kind.accepts(self.literals[name]) for name, kind in self.tool.literals.items())


Chain = tuple[Call, ...]  # from what opens a file to the change


def parse(text: str) -> list[Call]:
    """The calls of an answer, which begins at its first "[". Raises NotExecutable, in one line."""
    start = text.find("[")
    if start < 0:
        raise NotExecutable("the answer holds no list of calls")
    try:
        content, _ = json.JSONDecoder(parse_constant=_no_number).raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise NotExecutable(f"the answer is no JSON: {error}") from None
    if not content:
        raise NotExecutable("the answer makes no call")
    if len(content) > MOST_CALLS:
        raise NotExecutable(f"an answer may make {MOST_CALLS} calls, got {len(content)}")
    calls: list[Call] = []
    for one in content:
        calls.append(_call(one, calls))
    return calls


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _call(content: Any, before: Sequence[Call]) -> Call:
    name = content.get("tool") if isinstance(content, dict) else None
    if not isinstance(name, str) or name not in TOOLS:
        raise NotExecutable(f"call {len(before) + 1} names no tool: {str(content)[:80]!r}")
    tool = TOOLS[name]
    given = {key: value for key, value in content.items() if key != "tool"}
    if given.keys() != tool.parameters.keys():
        raise NotExecutable(f"{name} takes {', '.join(tool.parameters)}, got {', '.join(given)}")
    source = None
    if tool.takes is not None:
        source = _reference(given.pop(tool.takes), len(before))
        found, wanted = before[source].tool.gives, tool.parameters[tool.takes]
        assert isinstance(wanted, Ref)
        if found != wanted.kind:
            raise NotExecutable(f"{name} takes {wanted}, got {found or 'nothing'} from call {source + 1}")
    return Call(tool, given, source)


def _reference(value: Any, count: int) -> int:
    digits = value[1:] if isinstance(value, str) and value.startswith("$") else ""
    if not (digits.isascii() and digits.isdigit() and len(digits) < 4 and 1 <= int(digits) <= count):
        raise NotExecutable(f"call {count + 1} takes the result {str(value)[:40]!r} of no earlier call")
    return int(digits) - 1


def chains(calls: Sequence[Call]) -> tuple[list[Chain], int]:
    """The operation chain of every change and report, and how many calls serve none of them."""
    found, used = [], set()
    for number, call in enumerate(calls):
        if call.tool.gives is not None:
            continue
        path, at = [], number
        while True:
            path.append(calls[at])
            used.add(at)
            source = calls[at].source
            if source is None:
                break
            at = source
        found.append(tuple(reversed(path)))
    return found, len(calls) - len(used)


def written(calls: Sequence[dict[str, Any]]) -> str:
    """Calls as models are asked to write them."""
    return json.dumps(calls, separators=(",", ":"))
