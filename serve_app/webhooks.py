"""Webhooks: that a video has ended is told to the URL that its request named, signed, and at least once.

A message is signed as Standard Webhooks says (standardwebhooks.com), so that receivers verify it with any of its
libraries, and with the openai client. Its id is the same at every attempt.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import httpcore2
import httpx2
from standardwebhooks import Webhook

from serve_app.config import WebhooksConfig
from serve_app.jobs import Delivery, Outbox
from t2v_core.errors import InvalidRequest

logger = logging.getLogger(__name__)

_MAX_URL = 2048
_MAX_IN_FLIGHT, _MAX_PER_OWNER = 64, 16
_NUM_RESOLVERS = 4 * _MAX_IN_FLIGHT  # a name may be looked for longer than its message is under way
_GONE = 410
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def check_url(url: str, config: WebhooksConfig) -> None:
    """Raises InvalidRequest for a URL that is not told, as far as it can be known without asking for its addresses."""

    def refused(rule: str) -> InvalidRequest:
        return InvalidRequest(f"webhook_url {url!r:.100}: {rule}", param="webhook_url")

    if config.secret is None:
        raise refused("this service has no webhooks.secret to sign with; leave it out, and poll or watch the video")
    if len(url) > _MAX_URL:
        raise refused(f"must be at most {_MAX_URL} characters")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):
        raise refused("is no URL; write it as https://HOST/PATH") from None
    schemes = ("https", "http") if config.allow_private else ("https",)
    if parsed.scheme not in schemes or not parsed.host:
        raise refused(f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise refused("its port must be from 1 to 65535")
    if parsed.userinfo:
        raise refused("must hold no user name or password; put a token into its path or query")
    if not config.allow_private and not _may_be_public(parsed.host):
        raise refused("is an address of this machine or of a private network; give one that all can reach")


def signing_secret(secret: str, owner: str) -> str:
    """What the owner's messages are signed with, "whsec_...": each has one of its own, made of the service's."""
    digest = hmac.new(secret.encode(), b"t2v webhooks of " + owner.encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(digest).decode()}"


class Deliverer:
    """Brings what is due to its receivers, each on its own: one that is slow holds up no other key's."""

    def __init__(self, outbox: Outbox, config: WebhooksConfig, ssl_context: ssl.SSLContext | None = None) -> None:
        self._outbox, self._config = outbox, config
        # Of its own: in the event loop's few threads, slow names would hold up whatever else the process looks up.
        self._resolvers = ThreadPoolExecutor(_NUM_RESOLVERS, "webhook-names")
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=ssl_context or ssl.create_default_context(),
            max_connections=_MAX_IN_FLIGHT,
            max_keepalive_connections=0,
            network_backend=_Guarded(self._resolvers, allow_private=config.allow_private),
        )
        self._in_flight: dict[asyncio.Task[None], str] = {}  # to owners

    async def begin_due(self) -> None:
        """Send on its way what is due, and return before it has arrived."""
        claimed = await self._outbox.claim(
            limit=_MAX_IN_FLIGHT - len(self._in_flight),
            lease_s=3 * self._config.timeout_s,
            in_flight=Counter(self._in_flight.values()),
            max_per_owner=_MAX_PER_OWNER,
        )
        for delivery in claimed:
            task = asyncio.create_task(self._deliver(delivery))
            self._in_flight[task] = delivery.owner
            task.add_done_callback(self._in_flight.pop)

    async def close(self) -> None:
        """What is under way is cut off; whoever is there next sends it again."""
        for task in self._in_flight:
            task.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)
        await self._pool.aclose()
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            status: int | str = await self._post(delivery)
        except TimeoutError:
            status = f"no answer within {self._config.timeout_s:g} s"
        except Exception as error:  # whatever a receiver or its address brings about
            status = f"{type(error).__name__}: {error}"
        try:
            if isinstance(status, int) and 200 <= status < 300:
                await self._outbox.delivered(delivery)
                logger.info("webhook delivered: event=%s attempt=%d", delivery.id, delivery.attempts)
                return
            delays = self._config.retry_delays_s
            is_last = status == _GONE or delivery.attempts > len(delays)
            delay_s = None if is_last else delays[delivery.attempts - 1]
            await self._outbox.put_off(delivery, delay_s)
        except Exception as error:  # the message is due again when its lease has run out
            logger.warning("webhook unsettled: event=%s error=%r", delivery.id, error)
            return
        then = "given up" if delay_s is None else f"again in {delay_s:g} s"
        logger.warning("webhook failed: event=%s attempt=%d status=%s %s", delivery.id, delivery.attempts, status, then)

    async def _post(self, delivery: Delivery) -> int:
        """The status of the answer. Nothing more of it is read, and no redirect is followed."""
        assert self._config.secret is not None
        now = datetime.now(UTC)
        signer = Webhook(signing_secret(self._config.secret, delivery.owner))
        url = httpx2.URL(delivery.url)
        headers: dict[bytes | str, bytes | str] = {
            "host": url.netloc,
            "content-type": "application/json",
            "user-agent": "t2v-webhooks/1",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(delivery.id, now, delivery.body),
        }
        timeout_s = self._config.timeout_s
        async with (
            asyncio.timeout(timeout_s),
            self._pool.stream(
                "POST",
                str(url),
                headers=headers,
                content=delivery.body.encode(),
                extensions={"timeout": {"connect": timeout_s}},
            ) as response,
        ):
            return int(response.status)


class _Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses alone: a name is asked for once, and what was checked is what is connected to."""

    def __init__(self, resolvers: Executor, *, allow_private: bool) -> None:
        self._resolvers, self._allow_private = resolvers, allow_private
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # the interface has it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,  # Any: socket's own tuples
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        # One that swallows what it is sent leaves the others their share of the time.
        share_s = None if timeout is None else timeout / len(addresses)
        for address in addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore2.NetworkError, httpcore2.TimeoutException):
                continue
        return await self._backend.connect_tcp(addresses[-1], port, share_s, local_address, socket_options)

    async def _addresses(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._resolvers, partial(socket.getaddrinfo, host, port))
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self._allow_private:
            hidden = [address for address in addresses if not is_public(ipaddress.ip_address(address))]
            if hidden:
                raise httpcore2.ConnectError(f"{host} is at {hidden[0]}, which is not public")
        return addresses

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def is_public(address: _Address) -> bool:
    """Whether it is one of the whole Internet's, also where an IPv6 address stands for one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if any(inner is not None and not is_public(inner) for inner in embedded):
            return False
        if address.ipv4_mapped is None and address not in _NAT64 and address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


def _may_be_public(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return is_public(ipaddress.ip_address(host))
    except ValueError:
        return True  # a name: its addresses are looked at when it is called
