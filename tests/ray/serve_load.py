"""Clients that load a service of `serve_cluster`, and what becomes of each request."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Event
from typing import Any

import httpx
from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, OpenAI
from serve_cluster import MAX_TOKENS, NAME, QUESTIONS, Service, expected, text_of


@dataclass
class Load:
    """Clients that ask one question after the other, and what became of each request.

    Attributes:
        clients: how many there are.
        retries: that OpenAI's client makes when a request fails.
        ended: how each request ended: "right", "wrong", an HTTP status, "error in stream",
            "cut off" (a right beginning without a finish reason), "no connection", "stuck".
        failures: what the failed ones said.
        retried: questions that were answered after a try that failed.
    """

    service: Service
    clients: int
    retries: int
    ended: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    stop: Event = field(default_factory=Event)

    @property
    def right(self) -> int:
        return self.ended.count("right")

    def wait_for_answers(self) -> None:
        """Wait for more right answers than there are clients."""
        enough = self.right + self.clients
        self.service.wait_for(lambda: self.right > enough, "answers")

    def run(self, first: int) -> None:
        """One client; without retries, every other one reads streams."""
        client = self.service.client.with_options(max_retries=self.retries)
        plainly = streamed if first % 2 else unstreamed
        ask = self.patiently if self.retries else plainly
        for turn in count(first):
            if self.stop.is_set():
                return
            self.ended.append(self.outcome(ask, client, QUESTIONS[turn % len(QUESTIONS)]))

    def patiently(self, client: OpenAI, question: str) -> tuple[str, str | None]:
        """As `unstreamed`, and note whether that took more than one try."""
        response = client.chat.completions.with_raw_response.create(**_request(question))
        if response.retries_taken:
            self.retried.append(question)
        (choice,) = response.parse().choices
        return choice.message.content or "", choice.finish_reason

    def outcome(
        self, ask: Callable[[OpenAI, str], tuple[str, str | None]], client: OpenAI, question: str
    ) -> str:
        wanted = expected(question)
        try:
            answer = ask(client, question)
        except (APIError, httpx.TransportError) as error:
            self.failures.append(repr(error))
            return _failure(error)
        if answer == (text_of(wanted), wanted.finish_reason):
            return "right"
        self.failures.append(repr(answer))
        text, reason = answer
        return "cut off" if reason is None and text_of(wanted).startswith(text) else "wrong"


def unstreamed(client: OpenAI, question: str, **options: Any) -> tuple[str, str | None]:
    """Text and finish reason."""
    (choice,) = client.chat.completions.create(**_request(question), **options).choices
    return choice.message.content or "", choice.finish_reason


def streamed(client: OpenAI, question: str, **options: Any) -> tuple[str, str | None]:
    """Text and finish reason; a stream that just ends has none."""
    stream = client.chat.completions.create(**_request(question), stream=True, **options)
    choices = [choice for chunk in stream for choice in chunk.choices]
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    return "".join(choice.delta.content or "" for choice in choices), "".join(reasons) or None


def _request(question: str) -> dict[str, Any]:
    chat = [{"role": "user", "content": question}]
    return {"model": NAME, "messages": chat, "temperature": 0, "max_tokens": MAX_TOKENS}


def _failure(error: Exception) -> str:
    if isinstance(error, APIStatusError):
        return str(error.status_code)
    if isinstance(error, APITimeoutError | httpx.TimeoutException):
        return "stuck"
    broken = isinstance(error, APIConnectionError | httpx.TransportError)
    return "no connection" if broken else "error in stream"


@contextmanager
def load(service: Service, clients: int, retries: int = 0) -> Iterator[Load]:
    """Load while the context lasts; it ends when every request has ended."""
    load = Load(service, clients, retries)
    for question in QUESTIONS:
        expected(question)  # Once, not by each client.
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(load.run, i) for i in range(clients)]
        try:
            yield load
        finally:
            load.stop.set()
    for future in futures:
        future.result()
