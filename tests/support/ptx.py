"""Read PTX as compilers write it, and follow its registers through a kernel.

PTX ISA manual 9.0: "Syntax", "Instruction Set". What is read: `.entry` kernels, their parameters
and directives, labels, and instructions with their guards and operands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{", re.DOTALL)
_LABEL = re.compile(r"\s*(\$\w+):")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_REGISTER = re.compile(r"%(?:p|rs|r|rd|f|fd|h|hh|b|rq|SPL|SP)\d*\b")

# Instructions without a result.
_NO_RESULT = ("st", "bra", "bar", "barrier", "ret", "exit", "membar", "fence", "prefetch", "cp",
              "red", "trap", "brkpt", "call", "pmevent", "nanosleep", "discard", "applypriority",
              "brx", "mbarrier", "griddepcontrol")
_ENDS = ("ret", "exit", "trap")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its guard (a register, or ""), opcode with modifiers, and operands."""

    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def has_result(self) -> bool:
        return self.name not in _NO_RESULT

    def written(self) -> list[str]:
        """Registers that it sets."""
        return _REGISTER.findall(self.operands[0]) if self.has_result else []

    def read(self) -> list[str]:
        """Registers that it reads, its guard first."""
        sources = self.operands[1:] if self.has_result else self.operands
        registers = [register for text in sources for register in _REGISTER.findall(text)]
        return [self.guard, *registers] if self.guard else registers


@dataclass
class Block:
    """Instructions without a jump in or out but at the ends; where it goes on, by number."""

    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    """An `.entry`: parameters as `(type, bytes)`, directives before its body, and its blocks."""

    name: str
    parameters: list[tuple[str, str]]
    directives: dict[str, str]
    blocks: list[Block]

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions

    def before(self) -> list[list[int]]:
        """For each block, those that go on with it."""
        found: list[list[int]] = [[] for _ in self.blocks]
        for number, block in enumerate(self.blocks):
            for after in block.following:
                found[after].append(number)
        return found


@dataclass
class Module:
    """A PTX file: its version and target, its kernels, and everything else at its top level."""

    version: tuple[int, int]
    target: str
    kernels: list[Kernel]
    rest: str


def parse(text: str) -> Module:
    """Read a PTX file."""
    text = _COMMENT.sub("", text.rstrip("\0"))
    version = re.search(r"\.version\s+(\d+)\.(\d+)", text)
    target = re.search(r"\.target\s+(\w+)", text)
    assert version is not None and target is not None
    kernels, rest, at = [], [], 0
    for match in _ENTRY.finditer(text):
        rest.append(text[at : match.start()])
        at = _end_of_body(text, match.end())
        kernels.append(_kernel(match[1], match[2], match[3], text[match.end() : at - 1]))
    rest.append(text[at:])
    return Module((int(version[1]), int(version[2])), target[1], kernels, "".join(rest))


def _end_of_body(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise AssertionError("a body without an end")


def _kernel(name: str, parameters: str, directives: str, body: str) -> Kernel:
    sizes = []
    for parameter in filter(str.strip, parameters.split(",")):
        match = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+).*?(?:\[(\d+)\])?\s*$", parameter,
                          re.DOTALL)
        assert match is not None, parameter
        sizes.append((match[1], match[2] or ""))
    found = dict(re.findall(r"\.(\w+)\s+([^.]*)", directives))
    return Kernel(name, sizes, {key: value.strip() for key, value in found.items()}, _blocks(body))


def _blocks(body: str) -> list[Block]:
    blocks, labels, targets = [Block()], {}, []
    for statement in body.split(";"):
        while match := _LABEL.match(statement):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[match[1]] = len(blocks) - 1
            statement = statement[match.end() :]
        statement = statement.strip().strip("{}").strip()
        if not statement or statement.startswith("."):
            continue
        instruction = _instruction(statement)
        blocks[-1].instructions.append(instruction)
        if instruction.name == "bra" or instruction.name in _ENDS:
            targets.append((len(blocks) - 1, instruction))
            blocks.append(Block())
    jumps = dict(targets)
    for number, block in enumerate(blocks):
        last = jumps.get(number)
        if last is None or last.guard:
            if number + 1 < len(blocks):
                block.following.append(number + 1)
        if last is not None and last.name == "bra":
            block.following.append(labels[last.operands[0]])
    return blocks


def _instruction(statement: str) -> Instruction:
    guard = ""
    if match := _GUARD.match(statement):
        guard, statement = match[2], statement[match.end() :]
    head = re.match(r"\S+", statement)
    assert head is not None
    opcode, operands = head[0], statement[head.end() :]
    return Instruction(guard, opcode, tuple(_split(operands)))


def _split(operands: str) -> Iterator[str]:
    """Split at the commas outside of braces and brackets."""
    depth, start = 0, 0
    for at, char in enumerate(operands):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            yield operands[start:at].strip()
            start = at + 1
    if operands[start:].strip():
        yield operands[start:].strip()


# ---- Registers that nothing has set ------------------------------------------------------------


def unset_reads(kernel: Kernel) -> list[str]:
    """Find reads of registers that are not set on every way to them."""
    numbers: dict[str, int] = {}

    def mask(registers: list[str]) -> int:
        result = 0
        for register in registers:
            result |= 1 << numbers.setdefault(register, len(numbers))
        return result

    sets = [mask([r for i in block.instructions if not i.guard for r in i.written()])
            for block in kernel.blocks]
    everything = -1  # all bits
    before = kernel.before()
    at_start = [everything] * len(kernel.blocks)
    at_start[0] = 0
    changed = True
    while changed:
        changed = False
        for number in range(1, len(kernel.blocks)):
            value = everything
            for earlier in before[number]:
                value &= at_start[earlier] | sets[earlier]
            if value != at_start[number]:
                at_start[number], changed = value, True
    found = []
    for number, block in enumerate(kernel.blocks):
        if number and not before[number]:
            continue  # unreachable
        known = at_start[number]
        for instruction in block.instructions:
            missing = mask(instruction.read()) & ~known
            if missing:
                found.append(f"{kernel.name}: {instruction}")
            if not instruction.guard:
                known |= mask(instruction.written())
    return found


# ---- Barriers that only some threads of a block reach ------------------------------------------

# How much the threads of a block may differ in a value: not at all, from warp to warp, each.
BLOCK, WARP, THREAD = 0, 1, 2


def divergent_barriers(kernel: Kernel) -> list[str]:
    """Find block barriers after a branch that the threads of a block may take differently."""
    levels = _levels(kernel)
    controls = _controlling(kernel)
    found = []
    for number, block in enumerate(kernel.blocks):
        barrier = next((i for i in block.instructions if i.name in ("bar", "barrier")
                        and not i.opcode.startswith("bar.warp")), None)
        if barrier is None:
            continue
        for branch in _closure(number, controls):
            jump = kernel.blocks[branch].instructions[-1]
            if levels.get(jump.guard, BLOCK) != BLOCK:
                found.append(f"{kernel.name}: {barrier.opcode} after {jump}")
    return found


def _closure(number: int, controls: list[set[int]]) -> set[int]:
    seen: set[int] = set()
    waiting = [number]
    while waiting:
        for branch in controls[waiting.pop()] - seen:
            seen.add(branch)
            waiting.append(branch)
    return seen


def _levels(kernel: Kernel) -> dict[str, int]:
    """Find for each register how much the threads of a block may differ in it."""
    direct = _controlling(kernel)
    controls = [_closure(number, direct) for number in range(len(kernel.blocks))]
    levels: dict[str, int] = {}
    from_thread = {
        i.written()[0] for i in kernel.instructions() if i.has_result and "%tid" in i.operands[-1]
    }
    changed = True
    while changed:
        changed = False
        for number, block in enumerate(kernel.blocks):
            around = max((levels.get(kernel.blocks[b].instructions[-1].guard, BLOCK)
                          for b in controls[number]), default=BLOCK)
            for instruction in block.instructions:
                level = max(around, _level(instruction, levels, from_thread))
                for register in instruction.written():
                    if level > levels.get(register, BLOCK):
                        levels[register], changed = level, True
    return levels


def _level(i: Instruction, levels: dict[str, int], from_thread: set[str]) -> int:
    if not i.has_result:
        return BLOCK
    text = " ".join(i.operands[1:])
    if "%tid" in text or "%laneid" in text:
        return THREAD
    if "%warpid" in text:
        return WARP
    if i.name in ("atom", "mma", "ldmatrix", "movmatrix"):
        return THREAD
    if i.name == "vote":
        return WARP
    if i.name == "shfl":
        return WARP if re.fullmatch(r"\d+", i.operands[2]) and ".idx" in i.opcode else THREAD
    # The number of a warp, and comparisons that whole warps answer alike.
    first = i.operands[1] if len(i.operands) > 1 else ""
    last = i.operands[-1]
    if first in from_thread and re.fullmatch(r"-?\d+", last):
        if i.name == "shr" and int(last) >= 5:
            return WARP
        if i.name == "setp":
            whole = int(last) + (1 if ".gt" in i.opcode or ".le" in i.opcode else 0)
            if whole % 32 == 0 and not (".eq" in i.opcode or ".ne" in i.opcode):
                return WARP
    return max((levels.get(register, BLOCK) for register in i.read()), default=BLOCK)


def _controlling(kernel: Kernel) -> list[set[int]]:
    """For each block, the blocks whose branch decides whether it runs (Ferrante and others)."""
    count = len(kernel.blocks)
    end = count
    following = [block.following or [end] for block in kernel.blocks] + [[]]
    after = _dominated_by(count + 1, following, end)
    controls: list[set[int]] = [set() for _ in range(count)]
    for number, block in enumerate(kernel.blocks):
        if len(set(block.following)) < 2:
            continue
        own = after[number] & ~(1 << number)
        for target in block.following:
            # What comes after the target for certain, and not after the branch.
            only = after[target] & ~own
            for candidate in range(count):
                if only >> candidate & 1:
                    controls[candidate].add(number)
    return controls


def _dominated_by(count: int, following: list[list[int]], end: int) -> list[int]:
    """For each node the set, as bits, of those that every way from it to the end goes through."""
    everything = (1 << count) - 1
    result = [everything] * count
    result[end] = 1 << end
    changed = True
    while changed:
        changed = False
        for node in range(count - 1, -1, -1):
            if node == end:
                continue
            value = everything
            for after in following[node]:
                value &= result[after]
            value |= 1 << node
            if value != result[node]:
                result[node], changed = value, True
    return result
