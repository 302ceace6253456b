"""Token-level sampling through a deployment, as users of the trained model would be served."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import aiohttp
import httpx
import msgspec

from homefire.sdk.completion_stream import CompletionStream, StreamError
from homefire.sdk.completions import SampledCompletion, completion_of, weights_of
from homefire.sdk.concurrency import (
    ConcurrencyController,
    FixedConcurrencyController,
    RefusalListener,
)
from homefire.sdk.connection import Json, message_of
from homefire.sdk.loop_session import current_session
from homefire.sdk.metrics import ServerMetrics
from homefire.sdk.settings import resolve_api_key, resolve_base_url
from homefire.sdk.weights import check_identity
from homefire.wire.errors import WeightsMismatch
from homefire.wire.internal import WEIGHTS_HEADER

_PATH = "/inference/v1/completions"
_NOT_SERVING_YET = frozenset({404, 425})
_RETRYABLE = frozenset({408, 429, 502, 503, 504})
_MAX_CONNECTIONS = 1024
"""At once, when no controller limits the concurrency: more sockets than that help nobody."""
_KEPT_METRICS = 100_000
"""`drain_metrics` gives the newest so many, should nobody drain."""

Done = TypeVar("Done")


class ChatTokenizer(Protocol):
    """The one method that sampling needs of a tokenizer; every Hugging Face tokenizer has it."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class SamplingRetry:
    """How one completion is tried again: on 408, 429, 502, 503, 504, on broken connections and on
    streams cut short. Pauses double, vary by ±50 %, and give way to the server's Retry-After."""

    attempts: int = 7
    first_delay_s: float = 2.0
    max_delay_s: float = 30.0

    def delay_s(self, attempt: int, error: httpx.HTTPError, chance: float) -> float:
        """`attempt` counts from 0; `chance` in [0, 1) sets the jitter."""
        if isinstance(error, httpx.HTTPStatusError):
            asked = error.response.headers.get("retry-after", "")
            if asked.isdigit():
                return min(float(asked), self.max_delay_s)
        return min(self.first_delay_s * 2.0**attempt, self.max_delay_s) * (0.5 + chance)


@dataclass(frozen=True)
class _Streamed:
    response: Json
    metrics: ServerMetrics
    weights_header: str | None


class DeploymentSampler:
    """Samples completions with token ids and logprobs from one deployment.

    `model` is `accounts/<account>/deployments/<id>`, `tokenizer` any object with a Hugging Face
    `apply_chat_template` (only `sample_with_tokens` needs it). At most what the controller allows,
    or `max_concurrency`, runs at once; without either 1024 do. `http_timeout` bounds the
    silence of the server, in seconds. `inference_url` and `api_key` default as in
    `FireworksClient`.

    Works in any event loop and under repeated `asyncio.run`; all sampling methods are coroutines.
    Failures raise httpx.HTTPStatusError (with the server's message) or httpx.TransportError after
    the retries of `SamplingRetry`.
    """

    def __init__(
        self,
        inference_url: str | None,
        model: str,
        api_key: str | None = None,
        tokenizer: ChatTokenizer | None = None,
        concurrency_controller: ConcurrencyController | None = None,
        max_concurrency: int | None = None,
        *,
        http_timeout: float = 600.0,
        retry: SamplingRetry | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if concurrency_controller is not None and max_concurrency is not None:
            raise ValueError("give concurrency_controller or max_concurrency, not both")
        if not model:
            raise ValueError(
                "model is empty: use e.g. 'accounts/local/deployments/research-serving'"
            )
        if max_concurrency is not None:
            concurrency_controller = FixedConcurrencyController(max_concurrency)
        key = resolve_api_key(api_key)
        self.model = model
        self.tokenizer = tokenizer
        self.concurrency_controller = concurrency_controller
        self._window = concurrency_controller or FixedConcurrencyController(_MAX_CONNECTIONS)
        self._url = resolve_base_url(inference_url) + _PATH
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=http_timeout)
        self._retry = retry or SamplingRetry()
        self._sleep = sleep
        self._metrics: deque[ServerMetrics] = deque(maxlen=_KEPT_METRICS)
        self._headers = {
            "Content-Type": "application/json",
            "X-Api-Key": key,
            "Authorization": f"Bearer {key}",
            "Accept-Encoding": "identity",
        }

    async def sample_with_tokens(
        self,
        messages: list[dict[str, str]],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        *,
        expect_identity: str | None = None,
        **kwargs: Any,
    ) -> list[SampledCompletion]:
        """`n` completions of one conversation, rendered by the tokenizer's chat template.

        As `sample_with_prompt_tokens`. ValueError without a tokenizer.
        """
        prompt = self._render(messages)
        return await self.sample_with_prompt_tokens(
            prompt,
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            max_seq_len=max_seq_len,
            expect_identity=expect_identity,
            **kwargs,
        )

    async def sample_with_prompt_tokens(
        self,
        prompt_token_ids: list[int],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        stop: list[str] | list[int] | None = None,
        *,
        expect_identity: str | None = None,
        **kwargs: Any,
    ) -> list[SampledCompletion]:
        """`n` completions of one prompt, as `n` concurrent streamed requests.

        `max_seq_len` (tokens) drops completions that are longer with their prompt; a prompt that
        already is gets an empty list and no request. `expect_identity` raises
        homefire.wire.errors.WeightsMismatch when other weights made a completion. kwargs go into
        the request: logprobs=True, top_logprobs, top_p, top_k, seed, echo, echo_last, user, …
        """
        prompt = [int(token) for token in prompt_token_ids]
        _check_sampling(prompt, n=n, max_tokens=max_tokens, temperature=temperature)
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            return []
        if stop is not None:
            kwargs["stop"] = stop

        async def one() -> SampledCompletion:
            return await self._complete(prompt, max_tokens, temperature, expect_identity, kwargs)

        completions = await _all_or_none([one() for _ in range(n)])
        return [c for c in completions if max_seq_len is None or len(c.full_tokens) <= max_seq_len]

    async def async_completions_stream(
        self,
        prompt: list[int],
        max_tokens: int = 1024,
        temperature: float = 1.0,
        hotload_retry_interval: float = 5.0,
        hotload_max_retries: int = 10,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], ServerMetrics]:
        """One completion as the API's JSON object, its stream joined, and the server's metrics.

        404 and 425 (not serving yet, or swapping weights) are tried again `hotload_max_retries`
        times, `hotload_retry_interval` seconds apart. The concurrency controller is not asked.
        """
        body = self._body(prompt, max_tokens, temperature, kwargs)
        streamed = await self._stream(body, hotload_retry_interval, hotload_max_retries)
        return streamed.response, streamed.metrics

    def drain_metrics(self) -> list[ServerMetrics]:
        """The metrics of all completions since the last call, oldest first."""
        drained = list(self._metrics)
        self._metrics.clear()
        return drained

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer is missing: pass tokenizer=… to DeploymentSampler, "
                "or sample_with_prompt_tokens with token ids"
            )
        ids = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    def _body(
        self, prompt: list[int], max_tokens: int, temperature: float, extra: Mapping[str, Any]
    ) -> bytes:
        return msgspec.json.encode(
            {
                "model": self.model,
                "prompt": prompt,
                "n": 1,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "stream": True,
                "perf_metrics_in_response": True,
                "raw_output": True,
                **extra,
            }
        )

    async def _complete(
        self,
        prompt: list[int],
        max_tokens: int,
        temperature: float,
        expect_identity: str | None,
        extra: Mapping[str, Any],
    ) -> SampledCompletion:
        streamed = await self._stream_of(prompt, max_tokens, temperature, expect_identity, extra)
        weights = weights_of(streamed.response, streamed.weights_header)
        check_identity(weights, expect_identity)
        completion = completion_of(
            streamed.response, prompt, weights=weights, num_echoed=_num_echoed(prompt, extra)
        )
        for span in completion.weights_spans or []:
            check_identity(span.weights, expect_identity)
        return completion

    async def _stream_of(
        self,
        prompt: list[int],
        max_tokens: int,
        temperature: float,
        expect_identity: str | None,
        extra: Mapping[str, Any],
    ) -> _Streamed:
        """The server refuses other weights before it computes anything."""
        if expect_identity is None:
            body = self._body(prompt, max_tokens, temperature, extra)
            return await self._stream_within_window(body)
        insisting = {**extra, "expect_identity": expect_identity}
        body = self._body(prompt, max_tokens, temperature, insisting)
        try:
            return await self._stream_within_window(body)
        except httpx.HTTPStatusError as exc:
            if exc.response.status_code == httpx.codes.PRECONDITION_FAILED:
                raise WeightsMismatch(str(exc), field="expect_identity") from exc
            raise

    async def _stream_within_window(self, body: bytes) -> _Streamed:
        await self._window.acquire()
        metrics: ServerMetrics | None = None
        try:
            streamed = await self._stream(body)
            metrics = streamed.metrics
            return streamed
        finally:
            self._window.release(metrics)

    async def _stream(
        self, body: bytes, swap_interval_s: float = 5.0, swap_retries: int = 10
    ) -> _Streamed:
        request_id = secrets.token_hex(16)
        for attempt in range(self._retry.attempts):
            try:
                streamed = await self._stream_through_swaps(
                    body, request_id, swap_interval_s, swap_retries
                )
            except httpx.HTTPError as exc:
                if not _is_transient(exc):
                    raise
                self._tell_refusal(exc, attempt)
                if attempt + 1 == self._retry.attempts:
                    raise
                await self._sleep(self._retry.delay_s(attempt, exc, random.random()))
            else:
                self._metrics.append(streamed.metrics)
                return streamed
        raise ValueError("SamplingRetry.attempts must be at least 1")

    def _tell_refusal(self, error: httpx.HTTPError, attempt: int) -> None:
        if isinstance(self._window, RefusalListener):
            status = (
                error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
            )
            self._window.note_refusal(ServerMetrics.of_failure(status, attempt))

    async def _stream_through_swaps(
        self, body: bytes, request_id: str, interval_s: float, retries: int
    ) -> _Streamed:
        for _ in range(retries):
            try:
                return await self._attempt(body, request_id)
            except httpx.HTTPStatusError as exc:
                if exc.response.status_code not in _NOT_SERVING_YET:
                    raise
            await self._sleep(interval_s)
        return await self._attempt(body, request_id)

    async def _attempt(self, body: bytes, request_id: str) -> _Streamed:
        try:
            return await self._read_stream(body, request_id)
        except StreamError as exc:
            if exc.status is not None:
                raise self._status_error(exc.status, str(exc), {}) from exc
            raise httpx.RemoteProtocolError(str(exc), request=self._request()) from exc
        except TimeoutError as exc:
            text = f"no bytes for {self._timeout.sock_read:g} s from {self._url}"
            raise httpx.ReadTimeout(text, request=self._request()) from exc
        except aiohttp.ClientConnectorError as exc:
            raise httpx.ConnectError(str(exc), request=self._request()) from exc
        except aiohttp.ClientError as exc:
            raise httpx.ReadError(f"{type(exc).__name__}: {exc}", request=self._request()) from exc

    async def _read_stream(self, body: bytes, request_id: str) -> _Streamed:
        session = await current_session()
        started = time.perf_counter()
        ttft_s: float | None = None
        stream = CompletionStream()
        async with session.post(
            self._url,
            data=body,
            headers={**self._headers, "x-request-id": request_id},
            timeout=self._timeout,
        ) as response:
            if response.status >= 400:
                content = await response.read()
                raise self._status_error(response.status, message_of(content), response.headers)
            async for data in response.content.iter_any():
                if ttft_s is None:
                    ttft_s = time.perf_counter() - started
                stream.feed(data)
        joined = stream.response()
        perf = joined.get("perf_metrics")
        metrics = (
            ServerMetrics.from_values(perf, ttft_s)
            if perf
            else ServerMetrics.from_headers(dict(response.headers), ttft_s)
        )
        metrics.http_status_code = response.status
        return _Streamed(joined, metrics, response.headers.get(WEIGHTS_HEADER))

    def _status_error(
        self, status: int, message: str, headers: Mapping[str, str]
    ) -> httpx.HTTPStatusError:
        request = self._request()
        response = httpx.Response(status, headers=dict(headers), request=request)
        return httpx.HTTPStatusError(
            f"POST {_PATH} for {self.model}: HTTP {status}: {message}",
            request=request,
            response=response,
        )

    def _request(self) -> httpx.Request:
        return httpx.Request("POST", self._url)


def _is_transient(error: httpx.HTTPError) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _RETRYABLE
    return isinstance(error, httpx.TransportError)


def _num_echoed(prompt: Sequence[int], extra: Mapping[str, Any]) -> int:
    if extra.get("echo_last"):
        return min(int(extra["echo_last"]), len(prompt))
    return len(prompt) if extra.get("echo") else 0


def _check_sampling(prompt: Sequence[int], *, n: int, max_tokens: int, temperature: float) -> None:
    if not prompt:
        raise ValueError("the prompt has no tokens: give at least one")
    if n < 1:
        raise ValueError(f"n is {n}: use a whole number >= 1")
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}: use a whole number >= 0")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: use a number >= 0; 0 is greedy")


async def _all_or_none(work: Sequence[Coroutine[Any, Any, Done]]) -> list[Done]:
    """All results, or the first error with every other request cancelled."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
