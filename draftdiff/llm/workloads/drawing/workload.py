"""The drawing-revision workload: prompts, cases, a stream of them, and the summary of scores.

After DrafterBench (arXiv 2507.11527), with tasks and wordings of our own: its figures are not that benchmark's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from draftdiff.errors import UserError
from draftdiff.llm.workloads.base import Case, Score, Workload
from draftdiff.llm.workloads.drawing.calls import written
from draftdiff.llm.workloads.drawing.scoring import score
from draftdiff.llm.workloads.drawing.tasks import BUILDINGS, KINDS, Task, task
from draftdiff.llm.workloads.drawing.tools import SELECTORS, TOOLS, Ref, Tool
from draftdiff.llm.workloads.drawing.wording import instruction

POLICY = """You revise engineering drawings by calling tools. A place has four levels: the file, the page, the order \
of the marked rectangle on it, and the base, which is what in the rectangle is meant ({base}).
Plan: open each file once; read the marks of a page; pick the mark; find what the base names; make the changes; save \
each opened file once at the end.
If an instruction leaves out a level of a place, do not guess it and change nothing there: call report_missing with \
all four levels, "missing" for the one that is left out. Work on all other places as usual.
If a value is left open, choose any that the tool allows.
Answer with one JSON list of calls and nothing else. Each is {{"tool": name, parameter: value, ...}}; "$n" stands for \
the result of the n-th call."""
BASES = {
    "corner": "one of its corners or its centre",
    "text": "a text in it",
    "table": "the title of a table in it",
    "items": "the drawings, lines, rebars or columns that it covers or crosses",
}
EXAMPLE = """Example
instruction: In dock_15.pdf, on page 4, at mark 2, for the text "gate A7": delete it.
answer: {answer}"""
EXAMPLE_CALLS: list[dict[str, Any]] = [
    {"tool": "open_file", "path": "dock_15.pdf"},
    {"tool": "read_marks", "file": "$1", "page": 4},
    {"tool": "pick_mark", "marks": "$2", "order": 2},
    {"tool": "find_text", "mark": "$3", "content": "gate A7"},
    {"tool": "delete_text", "text": "$4"},
    {"tool": "save_file", "file": "$1"},
]


def tools_of(kind: str) -> list[Tool]:
    """The tools that a type of task may need, in the table's order."""
    finders = {"text": ["find_text"], "table": ["extract_table"], "items": list(SELECTORS.values()), "corner": []}
    names = {"open_file", "save_file", "read_marks", "pick_mark", "report_missing", *finders[KINDS[kind].base]}
    return [tool for name, tool in TOOLS.items() if name in names | set(KINDS[kind].changes)]


def _documented(tool: Tool) -> str:
    gives = f" -> {tool.gives}" if tool.gives else ""
    values = ", ".join(f"{name}: {kind}" for name, kind in tool.parameters.items())
    return f"{tool.name}({values}){gives}: {tool.about}"


def _signature(tool: Tool) -> str:
    names = ("$" if isinstance(kind, Ref) else name for name, kind in tool.parameters.items())
    return f"{tool.name}({','.join(names)})"


class DrawingWorkload(Workload):
    """compact: short prompts, a list of tools and the instruction, for a model that was trained on them; whole ones say
    the rules, what each tool does, and one example."""

    name = "drawing"
    headline = "score"
    metrics = {  # noqa: RUF012
        "score": "30 points for an answer that could run, 70 for the mean of the six ratios below",
        "executable": "whether it could run: a list of known calls, each fed by earlier ones",
        "arguments": "values that are right",
        "variables": "results of right calls that are handed on rightly",
        "calls": "right calls with values that their tools allow",
        "tools": "right tools",
        "sequences": "operation chains of the right tools",
        "plans": "operation chains that are right in all",
    }

    def __init__(self, compact: bool = False) -> None:
        self.compact = compact
        self.tokens = 256 if compact else 768

    def cases(self, seed: int, n: int) -> list[Case]:
        """The twelve types in turn."""
        kinds = list(KINDS)
        found = []
        for number in range(n):
            chance = random.Random(f"drawing {seed} {number}")
            found.append(self.case(task(kinds[number % len(kinds)], chance), chance))
        return found

    def stream(self, seed: int, n: int, block: int = 24) -> list[Case]:
        """Cases as an office sends them: for a block of cases one project, with few files and two types of task."""
        found = []
        for number in range(n):
            project = random.Random(f"drawing project {seed} {number // block}")
            files = [f"{project.choice(BUILDINGS)}_{project.randint(10, 99)}.pdf" for _ in range(2)]
            kinds = project.sample(list(KINDS), 2)
            chance = random.Random(f"drawing stream {seed} {number}")
            found.append(self.case(task(chance.choice(kinds), chance, files), chance))
        return found

    def case(self, made: Task, chance: random.Random) -> Case:
        """A task as a prompt with its answer."""
        tools = tools_of(made.kind)
        chance.shuffle(tools)
        said = instruction(made, chance)
        if self.compact:
            prompt = f"tools: {' '.join(map(_signature, tools))}\ninstruction: {said}\nanswer: "
        else:
            documented = "\n".join(map(_documented, tools))
            rules = POLICY.format(base=BASES[KINDS[made.kind].base])
            example = EXAMPLE.format(answer=written(EXAMPLE_CALLS))
            prompt = f"{rules}\n\nTools\n{documented}\n\n{example}\n\nNow\ninstruction: {said}\nanswer: "
        return Case(prompt, made.answer, made)

    def score(self, case: Case, text: str) -> Score:
        if not isinstance(case.truth, Task):
            raise UserError(f"case must be one of the drawing workload, got {type(case.truth).__name__}")
        return score(case.truth.truth, text)

    def summary(self, cases: Sequence[Case], scores: Sequence[Score]) -> dict[str, float]:
        """Mean of the types, each type's own mean, and the comprehensive score: the mean, less a twelfth of what the
        worst type lacks."""
        sets: dict[str, list[float]] = {}
        for case, one in zip(cases, scores):
            assert one["score"] is not None
            sets.setdefault(case.truth.kind, []).append(one["score"])
        means = {kind: fmean(found) for kind, found in sets.items()}
        average = fmean(means.values())
        return {"average": average, "comprehensive": average - (100 - min(means.values())) / len(KINDS), **means}
