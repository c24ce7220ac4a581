"""The server behind a router: another one with OpenAI's interface, such as vLLM's with an adapter for every axis."""

from __future__ import annotations

from typing import Any

import httpx2

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.endpoint import address_problems, key_from, listed_models
from alignx_ds.serve.protocol import ApiError

OPTION = "--router-for"
KEY_VARIABLE = "ALIGNX_UPSTREAM_API_KEY"
CONNECT_SECONDS = 10.0
SERVED = "the /v1 of a server with a model for every axis"
UNREADABLE = 502


class Upstream:
    """Knows which of the server's models stands for which experts, and passes requests on."""

    def __init__(self, url: str, experts: list[str]) -> None:
        """Asks the server for its models. Raises ConfigError where one is missing, or it does not answer."""
        if wrong := list(address_problems(url, OPTION, KEY_VARIABLE)):
            raise ConfigError(*wrong)
        self.url, self._experts, key = _with_version(url), experts, key_from(KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client: httpx2.AsyncClient | None = None  # made in the event loop that uses it
        self.models = listed_models(self.url, key, OPTION, SERVED)
        self.base = self._base()

    def model_for(self, gates: dict[str, float]) -> str:
        """Of the expert with the largest gate; or of all axes with at least half of it, if the server has this set.

        The model of a set is named by its axes, with plus signs between them, in the order of the experts.
        """
        strongest = max(gates, key=lambda name: gates[name])
        if strongest == self._experts[0]:
            return self.base
        together = "+".join(name for name in self._experts[1:] if gates[name] >= gates[strongest] / 2)
        return together if together in self.models else strongest

    async def send(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """The answer, whose body is still to be read, and closed. Raises ApiError where there is none."""
        if self._client is None:
            timeout, limits = httpx2.Timeout(None, connect=CONNECT_SECONDS), httpx2.Limits(max_connections=None)
            self._client = httpx2.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)
        request = self._client.build_request("POST", f"{self.url}/{path}", json=body)
        try:
            return await self._client.send(request, stream=True)
        except httpx2.TransportError as error:
            message = f"the server behind this router does not answer ({error})"
            raise ApiError(UNREADABLE, message, retry=True) from error

    def _base(self) -> str:
        """The model without an adapter: it is the one that is no axis, and no set of axes."""
        axes = set(self._experts[1:])
        if missing := sorted(axes - self.models.keys()):
            fix = f"it has no model {missing[0]!r}; serve that adapter under its axis's name"
            raise ConfigError(Problem(OPTION, self.url, SERVED, fix))
        others = [name for name in self.models if not axes.issuperset(name.split("+"))]
        if len(others) != 1:
            known = f"it has {len(others)} models that are no axes ({', '.join(others)})"
            raise ConfigError(Problem(OPTION, self.url, SERVED, f"{known}; serve the base model alone beside the axes"))
        return others[0]


def _with_version(url: str) -> str:
    """The address that ends in /v1."""
    bare = url.rstrip("/")
    return bare if bare.endswith("/v1") else f"{bare}/v1"
