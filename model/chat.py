"""How a checkpoint's conversations become prompts: by its own chat template, in Adept's format, or in Fuyu's.

Determines at start what a template does, by rendering a few conversations with it.  Knows nothing of HTTP.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from persimmon.model.chat_format import STOP, Turn, check_roles, render
from persimmon.model.chat_prompt import ChatPart, ChatPrompt, ImageTokens
from persimmon.model.chat_template_files import ChatTemplateError, TemplateSources
from persimmon.model.config import Architecture, PersimmonConfig
from persimmon.model.errors import CheckpointError
from persimmon.model.images import ImagePatches
from persimmon.model.token_finder import Part, TokenFinder
from persimmon.model.tokenizer import Tokenizer
from persimmon.model.tokenizer_settings import TokenizerSettings

if TYPE_CHECKING:
    from persimmon.model.chat_template import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The usual roles of messages. A template may name others."""

# Private-use characters, one of which no message contains.
_MARKS = range(0xF0000, 0x10FFFE)

_PLAIN_CONVERSATIONS = (
    (Turn("user", "What is a persimmon?"),),
    (Turn("system", "Be brief."), Turn("user", "Hello!")),
    (Turn("user", "a cat?"), Turn("assistant", "an animal"), Turn("user", "which?")),
    (
        Turn("system", "x\n\n y"),
        Turn("user", " two\n\nlines "),
        Turn("assistant", " so "),
        Turn("user", "<b>&amp;</b>"),
    ),
)
_PROBE = "Xylophone7"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}


@dataclass(frozen=True)
class Chat:
    """The chat format of a checkpoint.

    Attributes:
        tokenizer: the checkpoint's.
        template: the checkpoint's own; None where Adept's format is used.
        begin: token ids put before every conversation, unless its template has written them.
        written: token ids that Adept's format begins with, because the checkpoint's template writes them there.
        drops_bos: whether a BOS that the template writes is left out.
        stop: strings before which an answer ends.
        end_ids: special tokens with which an answer ends, besides the model's end-of-text.
        leading_space: whether the space that an answer begins with belongs to the format.
        takes_system: whether the template shows system messages.
        takes_tools: whether the template shows tools, in its own form.
        takes_parts: whether the template reads contents as lists of parts only.
        image_tokens: with which images are written; None where the model reads none.
        takes_images: whether images have a place in prompts: they lack one in some templates.
    """

    tokenizer: Tokenizer
    template: "ChatTemplate | None" = None
    begin: tuple[int, ...] = ()
    written: tuple[int, ...] = ()
    drops_bos: bool = False
    stop: tuple[str, ...] = (STOP,)
    end_ids: tuple[int, ...] = ()
    leading_space: bool = True
    takes_system: bool = True
    takes_tools: bool = False
    takes_parts: bool = False
    image_tokens: ImageTokens | None = None
    takes_images: bool = False

    @classmethod
    def fuyus(cls, tokenizer: Tokenizer, image_tokens: ImageTokens, add_bos: bool | None = None) -> Self:
        """Fuyu's format: texts and images one after the other, then the token that begins an answer.

        Args:
            tokenizer: the checkpoint's.
            image_tokens: the model's.
            add_bos: False leaves out the BOS before a text that a prompt begins with.
        """
        begin = () if add_bos is False else (image_tokens.begin,)
        return cls(tokenizer, begin=begin, stop=(), image_tokens=image_tokens, takes_images=True)

    @classmethod
    def adepts(cls, tokenizer: Tokenizer) -> Self:
        """Adept's format, with what the tokenizer puts before any text."""
        return cls(tokenizer, begin=tokenizer.begin)

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, add_bos: bool | None = None, image_tokens: ImageTokens | None = None
    ) -> Self:
        """The chat format of a checkpoint folder.

        A template that renders plain conversations like Adept's format is not used, so that features that only Adept's
        format has, like tools, are available; only whether it writes BOS counts.  (A model that reads images uses its
        template in any case.)

        Args:
            folder: the checkpoint.
            tokenizer: the folder's.
            add_bos: begin with BOS, or not; None does what the template does.
            image_tokens: of a model that reads images.

        Raises:
            CheckpointError: the template is not valid, cannot render a user message, or leaves out its content.
        """
        sources = TemplateSources.from_folder(folder)
        if sources is None:
            return cls.adepts(tokenizer) if image_tokens is None else cls.fuyus(tokenizer, image_tokens, add_bos)
        from persimmon.model.chat_template import ChatTemplate  # brings Jinja2

        template = ChatTemplate(sources, TokenizerSettings.from_folder(folder).named)
        bos: tuple[int, ...] = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
        begin = bos if add_bos else ()
        chat = cls(tokenizer, template, begin=begin, drops_bos=add_bos is False, image_tokens=image_tokens)
        try:
            chat._rendered(_messages(_PLAIN_CONVERSATIONS[0]))
        except ChatTemplateError as error:
            raise CheckpointError(
                f"{folder}: its chat template cannot render a user message: {error}; repair the template, or remove "
                f"it to use Adept's format"
            ) from None
        if not chat._reads_contents():
            chat = replace(chat, takes_parts=True)
            if not chat._reads_contents():
                raise CheckpointError(
                    f"{folder}: its chat template ignores the content of user messages; repair the template, or "
                    f"remove it to use Adept's format"
                )
        written = chat._before_adepts_format() if image_tokens is None else None
        if written is None:
            return chat._probed()
        return cls(tokenizer, written=written if add_bos is None else bos if add_bos else ())

    def of_turns(self, turns: Sequence[Turn], begin_answer: bool = True) -> ChatPrompt:
        """A conversation of texts in Adept's format, or in Fuyu's.

        Args:
            turns: at least one.
            begin_answer: end with the beginning of an answer.

        Raises:
            ChatFormatError: the format cannot hold it.
        """
        if self.image_tokens is not None:
            return self.of_contents([(turn.role, [turn.content]) for turn in turns], begin_answer)
        return ChatPrompt((*self.written, render(turns, begin_answer)), self.begin)

    def of_contents(
        self, contents: Sequence[tuple[str, Sequence[str | ImagePatches]]], begin_answer: bool = True
    ) -> ChatPrompt:
        """A conversation in Fuyu's format.

        Texts and images stand in their order, and each message ends with a line break.

        Args:
            contents: the role of each message, and its texts and images; at least one.
            begin_answer: end with the beginning of an answer.

        Raises:
            ChatFormatError: the format cannot hold it.
        """
        if self.image_tokens is None:
            raise ValueError("only a model that reads images has Fuyu's format")
        check_roles([role for role, _ in contents])
        parts: list[ChatPart] = []
        for _, content in contents:
            for part in (*content, "\n"):
                if isinstance(part, str) and parts and isinstance(before := parts[-1], str):
                    parts[-1] = before + part
                else:
                    parts.append(part)
        # An image ends with BOS, so that none is needed before it.
        begin = () if isinstance(parts[0], ImagePatches) else self.begin
        if begin_answer:
            parts.append((self.image_tokens.answer,))
        return ChatPrompt(tuple(parts), begin, self.image_tokens)

    def of_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
        images: Sequence[ImagePatches] = (),
        begin_answer: bool = True,
    ) -> ChatPrompt:
        """A conversation as the checkpoint's template renders it.

        The content of messages, tools and options stays text, even if it spells a special token.

        Args:
            messages: in the form of OpenAI's API; an image is a part {"type": "image"}.
            tools: likewise; None where there are none.
            options: variables for the template.
            images: those of the messages, in order.
            begin_answer: end with the beginning of an answer.

        Raises:
            ChatTemplateError: the template does not render it.
        """
        parts: list[ChatPart] = list(self._rendered(messages, tools, begin_answer, options))
        if images:
            parts = self._with_images(parts, images)
        if not parts or parts[0] != self.tokenizer.bos_token_id:
            return ChatPrompt(tuple(parts), self.begin, self.image_tokens)
        return ChatPrompt(tuple(parts[1:] if self.drops_bos else parts), (), self.image_tokens)

    def _with_images(self, parts: Sequence[ChatPart], images: Sequence[ImagePatches]) -> list[ChatPart]:
        """The parts with an image in place of each placeholder that the template has written."""
        tokens = self.image_tokens
        patch, begin = (None, None) if tokens is None else (tokens.patch, tokens.begin)
        places = sum(part == patch for part in parts)
        if places != len(images):
            raise ChatTemplateError(f"it writes {places} placeholders for {len(images)} images")
        following = iter(images)
        placed: list[ChatPart] = []
        for part in parts:
            ends_image = bool(placed) and isinstance(placed[-1], ImagePatches) and part == begin
            if not ends_image:  # an image has its own
                placed.append(next(following) if part == patch else part)
        return placed

    def allows_role(self, role: str) -> bool:
        """Whether the template accepts a role: a usual one, or one that it names."""
        return role in ROLES or (self.template is not None and self.template.names_role(role))

    @cached_property
    def _finder(self) -> TokenFinder:
        placeholders = () if self.image_tokens is None else (self.image_tokens.patch,)
        return self.tokenizer.special_finder(placeholders)

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[Part]:
        """What the template writes: text, and the ids of the special tokens that it has written itself."""
        if self.template is None:
            raise ChatTemplateError("there is none")
        if self.takes_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        held = "".join(_strings([messages, tools, options]))
        mark = next((chr(code) for code in _MARKS if chr(code) not in held), None)
        if mark is None:
            raise ChatTemplateError("the messages contain every private-use character of Unicode")

        def hidden(value: Any) -> Any:
            """The value with a mark inside each special token that its strings spell."""
            match value:
                case str():
                    return self._finder.hide(value, mark)
                case dict():
                    return {hidden(key): inner if key == "role" else hidden(inner) for key, inner in value.items()}
                case list():
                    return [hidden(inner) for inner in value]
            return value

        hidden_options = {name: hidden(value) for name, value in (options or {}).items()}
        text = self.template.render(
            hidden(list(messages)), tools and hidden(list(tools)), add_generation_prompt, hidden_options
        )
        parts = [part if isinstance(part, int) else part.replace(mark, "") for part in self._finder.split(text)]
        return [part for part in parts if part != ""]

    def _reads_contents(self) -> bool:
        """Whether the prompt contains the content of user messages."""
        try:
            first, second = (self._rendered(_messages([Turn("user", text)])) for text in ("Yes?", _PROBE))
        except ChatTemplateError:
            return False
        return first != second

    def _before_adepts_format(self) -> tuple[int, ...] | None:
        """What the template writes before Adept's format of a conversation; None where it has another format."""
        found: set[tuple[int, ...]] = set()
        for turns in _PLAIN_CONVERSATIONS:
            try:
                parts = self._rendered(_messages(turns))
            except ChatTemplateError:
                return None
            found.add(tuple(part for part in parts if isinstance(part, int)))
            if parts[-1] != render(turns) or len(parts) > 2 or not all(isinstance(part, int) for part in parts[:-1]):
                return None
        return found.pop() if len(found) == 1 else None

    def _probed(self) -> Self:
        """This format, with what rendering a few conversations shows about the template."""
        question = Turn("user", "What is a persimmon?")
        begun = self._rendered(_messages([question]))
        end_ids: tuple[int, ...] = ()
        leading_space = self._puts_space_after(begun[-1:])
        try:
            whole = self._rendered(_messages([question, Turn("assistant", _PROBE)]), add_generation_prompt=False)
        except ChatTemplateError:
            whole = []
        for part, after in pairwise([*whole, ""]):
            if isinstance(part, str) and _PROBE in part:
                before, _, rest = part.rpartition(_PROBE)
                if isinstance(after, int) and not rest:
                    end_ids = (after,)
                leading_space |= before.endswith(" ") and not (isinstance(begun[-1], str) and begun[-1].endswith(" "))
        return replace(
            self,
            stop=(),
            end_ids=end_ids,
            leading_space=leading_space,
            takes_system=self._shows([Turn("system", _PROBE), question]),
            takes_tools=self._shows([question], [_PROBE_TOOL]),
            takes_images=self._places_images(),
        )

    def _places_images(self) -> bool:
        """Whether the template writes a placeholder for each image."""
        if self.image_tokens is None:
            return False
        image = {"type": "image"}
        try:
            parts = self._rendered([{"role": "user", "content": [image, {"type": "text", "text": _PROBE}, image]}])
        except ChatTemplateError:
            return False
        return parts.count(self.image_tokens.patch) == 2

    def _puts_space_after(self, last: Sequence[Part]) -> bool:
        """Whether the tokenizer puts a space before a text that follows a special token, and that is the last part."""
        if not last or isinstance(last[0], str):
            return False
        ids = self.tokenizer.encode_parts([last[0], _PROBE], add_bos=False)
        return self.tokenizer.begins_with_prefix(ids[1:])

    def _shows(self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        try:
            parts = self._rendered(_messages(turns), tools)
        except ChatTemplateError:
            return False
        return any(isinstance(part, str) and _PROBE in part for part in parts)


def chat_format(folder: Path, config: PersimmonConfig, tokenizer: Tokenizer, add_bos: bool | None) -> Chat:
    """The chat format of a checkpoint; templates of a model that does not generate are not read.

    Raises:
        CheckpointError: as `Chat.from_folder`.
    """
    if config.architecture is not Architecture.CAUSAL_LM:
        return Chat.adepts(tokenizer)
    image_tokens = None if config.vision is None else ImageTokens.of(config.vision, tokenizer)
    return Chat.from_folder(folder, tokenizer, add_bos, image_tokens)


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _strings(value: Any) -> Iterator[str]:
    """All strings within JSON."""
    match value:
        case str():
            yield value
        case dict():
            for key, inner in value.items():
                yield key
                yield from _strings(inner)
        case list() | tuple():
            for inner in value:
                yield from _strings(inner)
