"""Prompts as the model saw chats: the tokenizer's template around messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_occ.data.fields import Messages


class Template(Protocol):
    """A tokenizer with a chat template."""

    def chat(self, messages: Messages, **kwargs: Any) -> str:
        """Text of a chat, up to where the model's turn begins."""
        ...


@dataclass(frozen=True)
class ChatFormat:
    """How a prompt becomes the text that the model continues.

    Args:
        template: of the tokenizer; None: it has none.
        always: text becomes a user's message, too; else it is taken as it is.
        system: text of a system message before all others; None: none is added.
        suffix: text behind the last message, or behind text.
        kwargs: for the template, e.g. ``enable_thinking``.
    """

    template: Template | None = None
    always: bool = False
    system: str | None = None
    suffix: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def text(self, prompt: str | Messages) -> str:
        """The text that the model continues.

        Raises:
            ValueError: messages, and there is no template, or it refuses them.
        """
        if isinstance(prompt, str):
            if not self.always:
                self._check_unused()
                return prompt + self.suffix
            prompt = [{"role": "user", "content": prompt}]
        if self.template is None:
            raise ValueError(
                "the prompt is a chat, and the tokenizer has no template for one. Use a tokenizer "
                "with chat_template (tokenizer.kind=hf), or a file of prompts as text"
            )
        messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + self.suffix}]
        if self.system is not None:
            messages = self._with_system(messages)
        return self.template.chat(messages, **self.kwargs)

    def _check_unused(self) -> None:
        for key, value in (("system", self.system), ("kwargs", self.kwargs)):
            if value:
                raise ValueError(
                    f"data.chat.{key} has no effect: the prompt is text, which is taken as it is. "
                    "Set data.chat.apply=always, or leave it out"
                )

    def _with_system(self, messages: Messages) -> Messages:
        if messages[0]["role"] == "system":
            raise ValueError(
                "data.chat.system is given, and the prompt has a system message of its own. "
                "Leave data.chat.system out"
            )
        return [{"role": "system", "content": self.system or ""}, *messages]
