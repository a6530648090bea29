"""What an answer must look like, as a request says it: a grammar, and the field that it comes from."""

from dataclasses import dataclass, replace

from persimmon.model.grammar import GrammarSpec


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like, and which field of the request says so.

    Attributes:
        field: like "response_format.json_schema.schema".
        grammar: the answer's.
        parts: where the grammar is made of several of the client's: these, each under its own field.
        says_additional_properties: whether the request says if its schemas' objects are open.
    """

    field: str
    grammar: GrammarSpec
    parts: tuple["Constraint", ...] = ()
    says_additional_properties: bool = False

    def opened(self) -> "Constraint":
        """The same with open objects where the request does not say."""
        if self.says_additional_properties:
            return self
        return replace(
            self,
            grammar=replace(self.grammar, additional_properties=True),
            parts=tuple(part.opened() for part in self.parts),
        )
