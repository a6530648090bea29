"""From one sample's tokens to its text: decoded, cut at stop strings, without the chat format, tools' calls apart."""

from collections.abc import Iterator, Sequence

from persimmon.model.chat_format import AnswerText
from persimmon.model.token_logprobs import TokenLogprobs
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.tool_calls import CallDelta, CallReader
from persimmon.server.engine.messages import SequenceOutput
from persimmon.server.http.generation.generation import Generation
from persimmon.server.http.generation.pieces import Piece
from persimmon.server.http.generation.prompt_images import PromptImages
from persimmon.server.http.generation.stop_strings import StopChecker
from persimmon.server.http.generation.token_report import ReportQueue, TokenReport, read_prompt, report

_ECHOED_AT_ONCE = 256
"""Prompt tokens that are read at once: with five alternatives each, some milliseconds."""


class SampleText:
    """The text of one sample: what its tokens say, up to where it ends.

    Args:
        choice: the sample's index among the request's choices.
        tokenizer: of the served model.
        generation: the request.
        min_tokens: stop strings are looked for only after this number of tokens.
        images: those of the prompt; None where it has none.
    """

    def __init__(
        self,
        choice: int,
        tokenizer: Tokenizer,
        generation: Generation,
        min_tokens: int = 0,
        images: PromptImages | None = None,
    ) -> None:
        self._choice = choice
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer() if images is None else images.detokenizer(tokenizer)
        self._stop = StopChecker(generation.stop_strings)
        # Takes the chat format's own space off.
        self._answer = AnswerText() if generation.is_chat and generation.begins_with_space else None
        self._calls = None if generation.calls is None else CallReader(generation.calls)
        # OpenAI says "stop" where the request names the function.
        self._says_tool_calls = generation.calls is not None and generation.calls.begun is None
        # Stop strings do not cut calls that a grammar enforces, only the text that may come instead of them.
        self._stops_content = generation.calls is not None and generation.calls.enforced
        self._call_deltas: list[CallDelta] = []
        self._reports = ReportQueue() if generation.logprobs is not None else None
        self._keeps_all_reports = not generation.is_chat
        self._unstoppable = min_tokens
        self._begin = ""
        self._length = 0  # characters of the text, those that are held back included
        self._shown = 0

    def echo(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> Iterator[None]:
        """Puts the prompt before the text; before any output.  Now and then it yields: a long prompt takes a while.

        Args:
            token_ids: the prompt's.
            logprobs: of its tokens but the first, or none.
        """
        texts = []
        prompt = read_prompt(self._tokenizer, self._detokenizer, token_ids)
        for place, (token_id, text, prefix) in enumerate(prompt):
            own = logprobs[place - 1] if 0 < place <= len(logprobs) else None
            self._note(token_id, own, prefix)
            texts.append(text)
            self._length += len(text)
            if place % _ECHOED_AT_ONCE == _ECHOED_AT_ONCE - 1:
                yield
        self._begin = "".join(texts)

    def push(self, output: SequenceOutput) -> Piece:
        """Takes the engine's next output, which is not an error."""
        ended = output.finish_reason
        readable = output.token_ids[:-1] if ended == "stop" else output.token_ids
        text, self._begin = self._begin, ""
        self._shown += len(text)
        logprobs: Sequence[TokenLogprobs | None] = output.logprobs or [None] * len(output.token_ids)
        # One by one, since a stop string may be complete before the last token of several.
        for count, (token_id, own) in enumerate(zip(readable, logprobs, strict=False), 1):
            text += self._read(token_id, own)
            if self._is_over:
                return self._piece(text, output, count, "stop")
        if ended is not None:
            if ended == "stop":
                self._note(output.token_ids[-1], logprobs[-1], "")
            text += self._finish(self._without_format(self._detokenizer.finish())[0])
            ended = "stop" if self._is_over else ended
        return self._piece(text, output, len(output.token_ids), ended)

    def _read(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        """What is certain of the text after one more token."""
        text, prefix = self._detokenizer.push((token_id,)), ""
        if self._answer is not None:
            text, prefix = self._without_format(text)
        if self._reports is not None:
            self._note(token_id, logprobs, prefix)
        self._length += len(text)
        if self._unstoppable:
            self._unstoppable -= 1
            return self._content(text)
        if self._stops_content:
            return self._stop_content(self._content(text))
        return self._content(self._stop.push(text))

    def _finish(self, text: str) -> str:
        """What is certain of the text once it has ended, with its last piece."""
        if self._calls is not None and self._stops_content:
            certain = self._stop_content(self._content(text) + self._calls.finish())
            held = self._stop.finish()
            self._shown += len(held)
            return certain + held
        return self._content(self._stop.push(text)) + self._content(self._stop.finish())

    def _stop_content(self, content: str) -> str:
        """What is certain of content that stop strings may end."""
        certain = self._stop.push(content)
        self._shown += len(certain) - len(content)
        return certain

    def _content(self, text: str) -> str:
        """What is certain to be content of a text that is certain; what adds to calls is kept for the piece."""
        self._shown += len(text)
        if self._calls is None:
            return text
        content, deltas = self._calls.push(text)
        self._call_deltas += deltas
        return content

    @property
    def _is_over(self) -> bool:
        """Whether the text has ended by itself, whatever the engine says."""
        return self._stop.matched or (self._calls is not None and self._calls.ended)

    def _without_format(self, text: str) -> tuple[str, str]:
        """A text without what the chat format puts before it, and that."""
        if self._answer is None:
            return text, ""
        answer = self._answer.push(text)
        return answer, text[: len(text) - len(answer)]

    def _note(self, token_id: int, logprobs: TokenLogprobs | None, prefix: str) -> None:
        if self._reports is not None:
            own = report(self._tokenizer, token_id, self._length, logprobs)
            self._reports.add([own.without_prefix(prefix) if prefix else own])

    def _piece(self, text: str, output: SequenceOutput, count: int, ended: str | None) -> Piece:
        if self._calls is not None and ended is not None:
            text += self._calls.finish()
            if ended == "stop" and self._calls.has_whole_calls and self._says_tool_calls:
                ended = "tool_calls"
        token_ids = output.token_ids[:count]
        if not output.logprobs and self._reports is None and self._calls is None:
            return Piece(
                choice=self._choice,
                text=text,
                token_ids=token_ids,
                finish_reason=ended,
                cached_tokens=output.cached_tokens,
            )
        calls, self._call_deltas = self._call_deltas, []
        reports: list[TokenReport] = []
        if self._reports is not None:
            reports = self._reports.visible(self._shown)
            if ended is not None and self._keeps_all_reports:
                reports += self._reports.rest()
        logprob = sum(own.logprob for own in output.logprobs[:count])
        return Piece(
            choice=self._choice,
            text=text,
            token_ids=token_ids,
            finish_reason=ended,
            cached_tokens=output.cached_tokens,
            reports=reports,
            logprob=logprob,
            calls=calls,
        )
