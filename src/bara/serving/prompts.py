"""Messages of OpenAI's API as a chat template reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bara.serving.problems import Problem

ROLES = ("system", "developer", "user", "assistant")


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages with a role and one text each.

    Raises:
        Problem: 400: a message has no text, or something that is none.
    """
    return [_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    for name, value in message.items():
        if name not in ("role", "content", "name") and value is not None:
            raise Problem(400, f"{where}.{name} is not supported here", param="messages")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Problem(400, f"{where}.role must be one of {', '.join(ROLES)}", param="messages")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in parts
    ]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Problem(400, f"{where}.content must be text", param="messages")
    text = "".join(map(str, texts))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Problem(400, f"{where}.content is no valid Unicode", param="messages") from error
    return {"role": "system" if role == "developer" else role, "content": text}
