"""How a sequence draws its tokens, as its request says it.  Plain data: it crosses the process boundary as it is."""

from dataclasses import dataclass, field

from persimmon.model.grammar_spec import GrammarSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence draws its tokens.

    The network's logits are changed in this order, which is vLLM's: `logit_bias`, penalties (repetition, frequency,
    presence), what is ruled out (stop tokens before `min_tokens`, tokens that the grammar does not allow), temperature,
    `min_p`, `top_k`, `top_p`.

    Attributes:
        temperature: 0 takes the most probable token (ties go to the lowest id).
        top_p: nucleus: the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
        top_k: keeps this many of the most probable tokens; 0 keeps all.
        min_p: drops tokens less probable than this share of the most probable one; 0 keeps all.
        seed: with a sample's index and a token's output position it determines the random draw, whatever else
            runs in the same step.  0 <= seed < 2**63.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or output; > 0.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: subtracted from the logit of a token for each time that it is in the output.
        logit_bias: added to the logits of these token ids.
        min_tokens: no stop token comes before this many tokens.
        logprobs: report each token's log-probability, and those of this many most probable tokens; None for none.
        grammar: what the answer must look like.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: GrammarSpec | None = None

    @property
    def greedy(self) -> bool:
        """Whether no draw is needed."""
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p may drop tokens."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were seen become less probable, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits change before a draw, whatever tokens came before."""
        return bool(self.logit_bias)

    @property
    def draws_from_output(self) -> bool:
        """Whether a draw depends on the tokens that were drawn before it."""
        return self.penalizes or self.grammar is not None

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the network's logits as they are, and nothing is reported of them."""
        return (
            self.logprobs is None
            and self.grammar is None
            and not self.changes_logits
            and self.min_tokens == 0
            and not self.penalizes
        )
