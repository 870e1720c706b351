"""One request to a server, as the `openai` package sends it, and what came of it."""

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI

from benchmarks.soak.traffic import CHAT, Request

# No request waits as long unless it is forgotten.
STUCK_SECONDS = 300.0


class Outcome(StrEnum):
    """What came of a request; the last three must not happen."""

    RIGHT = "right"
    LEFT = "left"
    REFUSED = "refused (503)"
    WRONG = "wrong"
    FAILED = "failed"
    STUCK = "stuck"


FAULTS = (Outcome.WRONG, Outcome.FAILED, Outcome.STUCK)


@dataclass
class Choice:
    """What has arrived of one choice of an answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def begins(self, whole: "Choice") -> bool:
        """Whether `whole` may still come of it."""
        known = whole.token_ids[: len(self.token_ids)]
        return self.token_ids == known and whole.text.startswith(self.text)


Answer = dict[int, Choice]
"""Choices by index."""


@dataclass(frozen=True)
class Way:
    """How a request is sent.

    Attributes:
        stream: in events.
        leave_after: events after which the client closes the connection.
    """

    stream: bool = False
    leave_after: int | None = None


WHOLE = Way()


@dataclass(frozen=True)
class Record:
    """What one request met with.

    Attributes:
        seconds: from sending to the last byte.
        detail: what went wrong.
    """

    kind: str
    outcome: Outcome
    seconds: float
    detail: str = ""


def connect(address: str) -> AsyncOpenAI:
    """A client that opens a connection for each request.

    A server may close an idle connection at the moment when it is used again.
    """
    return AsyncOpenAI(
        base_url=f"{address}/v1",
        api_key="none",
        max_retries=0,
        # Of connecting too: a busy server may be slow to accept.
        timeout=2 * STUCK_SECONDS,
        default_headers={"Connection": "close"},
    )


@dataclass(frozen=True)
class Client:
    """A client of one served model."""

    api: AsyncOpenAI
    model: str

    async def ask(self, request: Request, way: Way = WHOLE) -> Answer:
        """Send a request; what has come when the answer ends or the client leaves.

        Raises:
            APIError: the server refused, or broke off.
        """
        chats = request.api == CHAT
        create: Any = (self.api.chat.completions if chats else self.api.completions).create
        body = dict(request.body)
        asked = {key: body.pop(key) for key in ("messages", "prompt") if key in body}
        reply = await create(model=self.model, **asked, stream=way.stream, extra_body=body)
        answer: Answer = {}
        if way.stream:
            await _collect(reply, answer, way.leave_after)
        else:
            _add(reply.choices, answer)
        return answer

    async def judge(self, request: Request, expected: Answer | None, way: Way) -> Record:
        """Send a request and compare its answer with what it must be; None: a 400."""
        start = asyncio.get_running_loop().time()
        outcome, detail = await self._outcome(request, expected, way)
        return Record(request.kind, outcome, asyncio.get_running_loop().time() - start, detail)

    async def _outcome(
        self, request: Request, expected: Answer | None, way: Way
    ) -> tuple[Outcome, str]:
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                answer = await self.ask(request, way)
        except TimeoutError:
            return Outcome.STUCK, f"{request} {way}"
        except APIError as error:
            return refusal(error, expected), repr(error)
        return verdict(answer, expected, way), f"{request} {way} {expected} {answer}"


def verdict(answer: Answer, expected: Answer | None, way: Way) -> Outcome:
    """What an answer is worth: all of the expected one, or its beginning if the client left."""
    if answer == expected:
        return Outcome.RIGHT
    if expected is None or way.leave_after is None:
        return Outcome.WRONG
    begun = all(choice.begins(expected[index]) for index, choice in answer.items())
    return Outcome.LEFT if begun else Outcome.WRONG


def refusal(error: APIError, expected: Answer | None) -> Outcome:
    """What an error is worth: vLLM may be full, and must refuse bad requests."""
    status = _status(error)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return Outcome.REFUSED
    if status == HTTPStatus.BAD_REQUEST and expected is None:
        return Outcome.RIGHT
    return Outcome.FAILED


def _status(error: APIError) -> int | None:
    """Of the response; once a stream has begun with 200, of the event that ends it."""
    if isinstance(error, APIStatusError):
        return error.status_code
    return int(error.code) if error.code else None


async def _collect(stream: Any, answer: Answer, leave_after: int | None) -> None:
    """Add a stream's events to `answer`."""
    events = 0
    async with stream:
        async for chunk in stream:
            _add(chunk.choices, answer)
            events += 1
            if events == leave_after:
                return


def _add(choices: list[Any], answer: Answer) -> None:
    """Add choices, whole or in parts, of a chat or of a completion."""
    for part in choices:
        choice = answer.setdefault(part.index, Choice())
        # The first event of a streamed chat tells the role alone.
        choice.token_ids += getattr(part, "token_ids", None) or []
        choice.text += _text(part) or ""
        choice.finish_reason = part.finish_reason or choice.finish_reason


def _text(part: Any) -> str | None:
    message = getattr(part, "delta", None) or getattr(part, "message", None)
    return part.text if message is None else message.content
