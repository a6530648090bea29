"""What a request asks the engine to generate, checked: its prompts, and what its samples have in common."""

from dataclasses import dataclass

from persimmon.model.sampling_params import SamplingParams
from persimmon.model.tool_calls import CallForm
from persimmon.server.engine.messages import Submit
from persimmon.server.http.generation.prompt_images import PromptImages
from persimmon.server.http.generation.stop_strings import StopStrings
from persimmon.server.http.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and what to generate for it.

    Attributes:
        token_ids: at least one.
        max_tokens: new tokens per sample, at most.
        sampling: of the prompt's first sample; the others differ only in their sample_index.
        images: those of the prompt; None where it has none.
    """

    token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    images: PromptImages | None = None

    @property
    def num_image_tokens(self) -> int:
        """Tokens of its images."""
        return 0 if self.images is None else self.images.num_tokens


@dataclass(frozen=True, slots=True)
class Generation:
    """A request as the engine will see it, checked.

    Attributes:
        prompts: at least one.
        n: answers to each prompt.
        samples: of each prompt, of which the n most probable are the answers; n of them or more.
        stop_token_ids: tokens that end a sample and are not part of its text.
        stop_strings: strings that end a sample and are not part of its text.
        is_chat: whether the text is an answer in a conversation.
        echo: whether a sample's text begins with its prompt's.
        logprobs: number of most probable tokens to report with each token; None reports no tokens.
        record: of the request; what its sequences come to is written into it.
        calls: the tools that an answer may call; None if its text is never read as calls.
        priority: requests of a lower one go first.
        speculate: whether next tokens may be guessed.
        begins_with_space: whether a chat's answer begins with a space that belongs to the format.
    """

    prompts: list[Prompt]
    n: int
    samples: int
    stop_token_ids: list[int]
    stop_strings: StopStrings
    is_chat: bool
    echo: bool
    logprobs: int | None
    record: RequestRecord
    calls: CallForm | None = None
    priority: int = 0
    speculate: bool = True
    begins_with_space: bool = True

    @property
    def choices(self) -> int:
        """Samples in all; choice prompt_index * samples + sample_index is a prompt's sample."""
        return len(self.prompts) * self.samples

    def prompt_token_ids(self, choice: int) -> list[int]:
        """The tokens of the prompt that a choice continues."""
        return self.prompts[choice // self.samples].token_ids

    def submission(self, prompt: Prompt) -> Submit:
        """What the engine is to do for one of the prompts."""
        return Submit(
            token_ids=prompt.token_ids,
            spans=[] if prompt.images is None else prompt.images.spans,
            max_tokens=prompt.max_tokens,
            stop_token_ids=self.stop_token_ids,
            sampling=prompt.sampling,
            samples=self.samples if prompt.max_tokens else 1,  # without new tokens all samples are the same
            prompt_logprobs=self.logprobs if self.echo else None,
            priority=self.priority,
            speculate=self.speculate,
            cache_salt=self.record.cache_salt,
            request_id=self.record.request_id,
            owner=self.record.owner,
            weight=self.record.share,
        )
