"""PTX and SASS as lists of instructions with the paths between them.

Knows labels, predicates and jumps; no kernel and no rule.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

ENTRY = -1
"""The place before the first instruction, where a path may begin."""

# SASS has conditional jumps without a predicate, whose condition is an operand: BRA.U UP0, 0x120.
_JUMP = re.compile(r"(?:bra|BRA|CALL\.REL)\S*\s+(?:(?P<condition>\S+),\s*)?(?P<target>\$?\w+)$")
_END = re.compile(r"(?:ret|RET|exit|EXIT|trap)\b")
_OTHER_JUMP = re.compile(r"(?:brx|BRX|JMP|JMX|call)\b")
_PTX_COMMENT = re.compile(r"//[^\n]*")
_PTX_LABEL = re.compile(r"(\$?\w+):(?!:)\s*(.*)", re.DOTALL)
_PTX_INSTRUCTION = re.compile(r"(?:(@!?%?\w+)\s+)?([a-z].*)", re.DOTALL)
_SASS_LINE = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([^;]+?)\s*;")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its text without predicate and semicolon, and the predicate that it is executed under."""

    text: str
    predicate: str = ""


@dataclass(frozen=True)
class Code:
    """A kernel's instructions in their order, and the places that each label, or each address in SASS, stands for.

    Blocks of inline assembly have labels of their own, so PTX may define one several times.
    """

    instructions: tuple[Instruction, ...]
    labels: dict[str, list[int]]

    @classmethod
    @lru_cache(maxsize=512)  # every rule reads the same codes
    def of_ptx(cls, ptx: str) -> "Code":
        """The body of the one kernel in a module of PTX."""
        body = _PTX_COMMENT.sub("", ptx[ptx.index(".entry") :])
        body = body[body.index("{") + 1 :].partition("$L__func_end")[0]
        instructions: list[Instruction] = []
        labels: dict[str, list[int]] = {}
        for statement in body.split(";"):
            # Inline assembly may have a block of its own; directives have lines of their own.
            lines = [line for line in statement.splitlines() if not line.lstrip().startswith(".")]
            text = "\n".join(lines).strip("{} \t\n")
            while label := _PTX_LABEL.match(text):
                labels.setdefault(label[1], []).append(len(instructions))
                text = label[2]
            if found := _PTX_INSTRUCTION.match(" ".join(text.split())):
                instructions.append(Instruction(found[2], found[1] or ""))
        return cls(tuple(instructions), labels)

    @classmethod
    @lru_cache(maxsize=512)
    def of_sass(cls, sass: str) -> "Code":
        """Lines of nvdisasm; instructions that are never executed (@!PT) are left out."""
        instructions: list[Instruction] = []
        labels: dict[str, list[int]] = {}
        for address, predicate, text in _SASS_LINE.findall(sass):
            labels[hex(int(address, 16))] = [len(instructions)]
            if predicate != "@!PT":
                instructions.append(Instruction(text, predicate))
        return cls(tuple(instructions), labels)

    @cached_property
    def successors(self) -> list[list[int]]:
        """Of each instruction, the places of those that may be executed next."""
        following = []
        for place, instruction in enumerate(self.instructions):
            if _OTHER_JUMP.match(instruction.text):
                raise ValueError(f"a jump to an unknown place: {instruction.text}")
            jump = _JUMP.match(instruction.text)
            always = not instruction.predicate and (
                _END.match(instruction.text) or (jump and not jump["condition"] and "CALL" not in instruction.text)
            )
            targets = [] if always else [place + 1]
            if jump:
                targets.append(self._target(jump["target"], place))
            following.append(targets)
        return following

    def _target(self, label: str, jump: int) -> int:
        """The nearest definition before a jump, or else the first behind it."""
        places = self.labels[label]
        return max((place for place in places if place <= jump), default=places[0])

    def find(self, pattern: str) -> list[int]:
        """Places of the instructions that begin with a match."""
        return [place for place, each in enumerate(self.instructions) if re.match(pattern, each.text)]

    def reached(self, starts: Iterable[int], stops: Iterable[int] = ()) -> set[int]:
        """Places of the instructions that some path from behind a start comes to before it comes to a stop."""
        ends = set(stops)
        seen: set[int] = set()
        ahead = [following for start in starts for following in (self.successors[start] if start != ENTRY else [0])]
        while ahead:
            place = ahead.pop()
            if place not in seen and place < len(self.instructions):
                seen.add(place)
                if place not in ends:
                    ahead += self.successors[place]
        return seen
