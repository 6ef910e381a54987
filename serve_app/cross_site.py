"""Pages of other sites, and what they may not have their visitors' browsers do to a service without keys.

A browser sends a form to any address, that of one's own machine among them, and asks nobody. A key it would not send.
"""

from urllib.parse import urlsplit

from fastapi import Request

from serve_app.errors import CrossSite
from serve_app.parts import Parts


async def refuse_other_sites(request: Request, parts: Parts) -> None:
    """Raise CrossSite for a call of another site's page, where no key stands in its way."""
    if not parts.keys.are_needed and _is_of_another_site(request):
        origin = request.headers.get("origin")
        raise CrossSite(
            f"origin {origin!r:.100}: a page of another site may not do this on a service without API keys; "
            "use the service's own page, or give it keys"
        )


def _is_of_another_site(request: Request) -> bool:
    """What the browser says, which does so at https and on its own machine alone; elsewhere, what Origin and Host say.

    Who is no browser sends none of these. Ports do not count, as to browsers.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None or origin is None:
        return site == "cross-site"
    asked_for = [request.headers.get("host", ""), *request.headers.get("x-forwarded-host", "").split(",")]
    return _host(origin) not in {_host(f"//{host.strip()}") for host in asked_for} - {None}


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
