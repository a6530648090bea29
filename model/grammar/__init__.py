"""Answers that follow a grammar: JSON of a schema, one of some choices, a regular expression, a context-free grammar.

A layer over llguidance, which finds what may come next.  Knows token ids and their bytes, nothing of prompts or logits,
and imports no torch: API workers check a client's grammar here before the engine process compiles it.
"""

from persimmon.model.grammar.compiler import GrammarCompiler
from persimmon.model.grammar.forced_text import ForcedText
from persimmon.model.grammar.matcher import Matcher
from persimmon.model.grammar_spec import KINDS, GrammarError, GrammarKind, GrammarSpec

__all__ = ["KINDS", "ForcedText", "GrammarCompiler", "GrammarError", "GrammarKind", "GrammarSpec", "Matcher"]
