"""Optimized HLO text as instructions, each with the number of times it runs.

1. A computation is a list of instructions ``NAME = TYPE OP(OPERANDS), ATTRIBUTES``.
2. From the entry on, an instruction of a loop's body runs ``n`` times as often as the loop. ``n``
   is the compiler's ``known_trip_count``, else the constant that the condition compares the counter
   with, followed into the loop's initial values where it was moved there. A loop whose count is not
   in the text (it depends on data) counts once and is listed in ``unknown_loops``.
3. All branches of a conditional count, which is an upper bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "s2", "u2"), 1),
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e8m0fnu"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
"""Bytes of one element by HLO type name; four-bit numbers count a byte."""

SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
OPERATION = re.compile(r"([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
LISTED = re.compile(r"(?:called|branch)_computations=\{([^}]*)\}")
CALLERS = {"fusion", "call", "async-start", "custom-call", "conditional", "map"}


class Instruction(NamedTuple):
    """One line; ``rest`` is everything after the operation's opening bracket."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return [part.split(" ")[-1].lstrip("%") for part in _split(self.rest) if part]

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the line, or None."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None


class Visit(NamedTuple):
    """An instruction, where it stands, and how often it runs."""

    times: int
    computation: str
    instruction: Instruction


def sizes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type, which may be a tuple, as (element type, dimensions)."""
    found = SHAPE.findall(type_text)
    return [(t, tuple(int(n) for n in d.split(",") if n)) for t, d in found if t in BYTES]


def num_bytes(type_text: str) -> int:
    """Bytes of a type without the padding of its layout."""
    return sum(BYTES[element] * math.prod(dims) for element, dims in sizes(type_text))


class Module:
    """A parsed module.

    Attributes:
      computations: name -> instructions by name, in order.
      entry: the computation that runs.
      unknown_loops: loops whose trip count is not in the text, filled by ``visits``.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            # Headers start at the left edge; instructions are indented below them.
            if header := COMPUTATION.match(line):
                current = self.computations.setdefault(header.group(2), {})
                if header.group(1):
                    self.entry = header.group(2)
            elif (found := INSTRUCTION.match(line)) and (parsed := _parse(*found.groups())):
                current[parsed.name] = parsed
        if not self.entry:
            raise ValueError("hlo: the text has no ENTRY computation; give a module's as_text().")

    def visits(self) -> Iterator[Visit]:
        """Every instruction that runs, with its count."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            for instruction in self.computations.get(name, {}).values():
                yield Visit(times, name, instruction)
                # The condition's few scalar operations are left out.
                if instruction.op == "while":
                    body = instruction.attribute(r"body=%?([\w.\-]+)")
                    waiting.append((body, times * self.trips(name, instruction)))
                elif instruction.op in CALLERS:
                    waiting += [(called, times) for called in _called(instruction)]

    def fused(self) -> set[str]:
        """Names of the computations that run inside one kernel: their results are no buffers."""
        # What a fusion computes inside stays in registers; only its result is written.
        every = (i for found in self.computations.values() for i in found.values())
        return {name for i in every if i.op == "fusion" for name in _called(i)}

    def operand_types(self, visit: Visit) -> list[str]:
        """Types of an instruction's operands."""
        known = self.computations[visit.computation]
        return [known[name].type for name in visit.instruction.operands if name in known]

    def trips(self, computation: str, loop: Instruction) -> int:
        """How often a loop's body runs: ``n`` of ``for (i = 0; i < n; i++)``; 1 if unknown."""
        # XLA notes the count where its own analysis finds it.
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", {})
        initial = self._initial(computation, loop)
        limits = [self._limit(c, condition, initial) for c in condition.values()]
        limits = [n for n in limits if n is not None]
        # No comparison with a constant, or several: the data decide.
        if len(limits) != 1:
            self.unknown_loops.add(loop.name)
            return 1
        return limits[0]

    def _initial(self, computation: str, loop: Instruction) -> list[Instruction | None]:
        """What a loop's state consists of before its first round."""
        known = self.computations[computation]
        state = known.get(loop.operands[0])  # a loop has one operand, a tuple
        if state is None or state.op != "tuple":
            return []
        return [known.get(name) for name in state.operands]

    def _limit(
        self, compare: Instruction, condition: dict[str, Instruction], initial: list
    ) -> int | None:
        """The constant of a comparison ``counter < constant``, wherever it is kept."""
        if compare.op != "compare" or "direction=LT" not in compare.rest:
            return None
        limit = condition.get(compare.operands[1])
        for _ in range(8):  # through copies, and once into the initial values
            if limit is None:
                return None
            if limit.op == "constant":
                value = re.match(r"(\d+)\)", limit.rest)
                return int(value.group(1)) if value else None
            # Loop-invariant code motion has moved the constant into the loop's state.
            if limit.op == "get-tuple-element":
                index = int(limit.attribute(r"index=(\d+)"))
                limit = initial[index] if index < len(initial) else None
            elif limit.op in ("copy", "bitcast", "convert"):
                limit = condition.get(limit.operands[0])
            else:
                return None
        return None


def _parse(name: str, rest: str) -> Instruction | None:
    """Splits ``TYPE OP(...`` where the type ends: at a space outside all brackets."""
    end = next((i for i, letter, depth in _depths(rest) if letter == " " and depth == 0), None)
    found = None if end is None else OPERATION.match(rest[end + 1 :])
    return Instruction(name, rest[:end], *found.groups()) if found else None


def _split(text: str) -> list[str]:
    """The parts of a list up to its closing bracket, comments left out."""
    start, parts = 0, []
    # Long tuples are numbered, /*index=5*/, and the marks hold no brackets but commas may follow.
    text = re.sub(r"/\*.*?\*/", "", text)
    for i, letter, depth in _depths(text + ")"):
        if (letter == "," and depth == 0) or depth < 0:
            parts.append(text[start:i].strip())
            start = i + 1
        if depth < 0:
            break
    return parts


def _depths(text: str) -> Iterator[tuple[int, str, int]]:
    """Each letter's place, the letter, and how many brackets are open after it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        yield i, letter, depth


def _called(instruction: Instruction) -> list[str]:
    # calls=%f and to_apply=%f name one computation, branch_computations={%f, %g} several.
    listed = ",".join(LISTED.findall(instruction.rest))
    names = [name.strip().lstrip("%") for name in listed.split(",") if name.strip()]
    return [*CALLED.findall(instruction.rest), *names]
