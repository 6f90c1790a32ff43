"""The web page at `/`: the files of serving/web, as they are."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "web"

_HEADERS = {
    # Nothing from elsewhere runs here, and nobody frames a page that holds a microphone.
    "content-security-policy": "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",  # the query of a link to this page may hold a key
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked again each time, answered 304: a new build is seen at once
}


class WebPage(StaticFiles):
    """Mount it last, at "/": it answers whatever no route has taken."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response
