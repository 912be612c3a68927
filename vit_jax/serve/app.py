# SPDX-License-Identifier: Apache-2.0
"""The web application: a page, and predictions over HTTP."""

import base64
import contextlib
import dataclasses
import functools
import html
import importlib.resources
import io
import time
import warnings
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vit_jax.inference.draw import encode_png
from vit_jax.inference.figures import has_attention, overlay_rollout
from vit_jax.inference.model import LoadedModel
from vit_jax.serve.batches import Batcher
from vit_jax.serve.openapi import describe_api
from vit_jax.utils.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost")

# Nothing comes from elsewhere, and nothing goes there.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_RETRY_S = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes.

    Attributes:
      bytes: of an image.
      pixels: of an image, before it is decoded.
      requests: that are worked on at a time; more are sent away.
      batch_size: images that are computed together.
    """

    bytes: int = 10 * 2**20
    pixels: int = 50_000_000
    requests: int = 64
    batch_size: int = 16


class Server:
    """Answers requests with a model.

    Args:
      model: that classifies.
      limits: of what is taken.
    """

    def __init__(self, model: LoadedModel, limits: Limits):
        self._model, self._limits = model, limits
        self._batcher = Batcher(
            functools.partial(model.features, layer="logits"), most=limits.batch_size
        )
        self._open = 0  # requests that are worked on

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Around all requests."""
        self._decoders = CapacityLimiter(4)
        async with self._batcher.running():
            yield

    async def show_page(self, request: Request) -> Response:
        """`GET /`."""
        text = importlib.resources.files("vit_jax.serve").joinpath("page.html").read_text("utf-8")
        model = self._model
        height, width, _ = model.image_shape
        facts = f"{model.module.num_classes} classes, images of {height}×{width}"
        for name, value in (("SOURCE", model.source), ("FACTS", facts)):
            text = text.replace(f"%{name}%", html.escape(value))
        return HTMLResponse(text, headers=_HEADERS)

    async def describe(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        classes = self._model.module.num_classes
        limits = self._limits
        return JSONResponse(
            describe_api(classes=classes, max_bytes=limits.bytes, max_pixels=limits.pixels)
        )

    async def say_health(self, request: Request) -> Response:
        """`GET /healthz`."""
        classes = self._model.module.num_classes
        return JSONResponse({"status": "ok", "model": self._model.source, "classes": classes})

    async def predict(self, request: Request) -> Response:
        """`POST /v1/predict`."""
        if self._open >= self._limits.requests:
            headers = {"Retry-After": str(_RETRY_S)}
            raise HTTPException(503, "too many requests at a time", headers=headers)
        self._open += 1
        try:
            return JSONResponse(await self._predict(request))
        finally:
            self._open -= 1

    async def _predict(self, request: Request) -> dict[str, Any]:
        top_k, overlay = self._read_options(request.query_params)
        content = await self._read_body(request)
        started = time.perf_counter()
        image = await to_thread.run_sync(self._prepare, content, limiter=self._decoders)
        logits = await self._batcher(image)
        prediction = self._model.predict(logits[None])
        drawn = None
        if overlay and has_attention(self._model):
            drawn = await to_thread.run_sync(self._draw, image, limiter=self._batcher.device)
        return {
            "predictions": [
                {
                    "label": label,
                    "class": self._model.name_of(label),
                    "probability": float(prediction.probabilities[0, label]),
                }
                for label in prediction.top(top_k)[0].tolist()
            ],
            "milliseconds": round(1e3 * (time.perf_counter() - started), 3),
            "overlay": drawn,
        }

    def _read_options(self, query: Mapping[str, str]) -> tuple[int, bool]:
        classes = self._model.module.num_classes
        if unknown := sorted(query.keys() - {"top_k", "overlay"}):
            raise HTTPException(400, f"{unknown[0]!r} is unknown; expected top_k or overlay")
        top_k, overlay = query.get("top_k", str(min(5, classes))), query.get("overlay", "false")
        if not (top_k.isascii() and top_k.isdigit() and 1 <= int(top_k[:9]) <= classes):
            raise HTTPException(400, f"top_k={top_k[:20]!r}: expected 1 to {classes}")
        if overlay not in ("true", "false"):
            raise HTTPException(400, f"overlay={overlay[:20]!r}: expected true or false")
        return int(top_k), overlay == "true"

    async def _read_body(self, request: Request) -> bytes:
        most = self._limits.bytes
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > most:
                raise HTTPException(413, f"the image has more than {most:,} bytes")
        if not content:
            raise HTTPException(415, "the body is empty: expected the bytes of an image")
        return bytes(content)

    def _prepare(self, content: bytes) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                # Pillow warns of sizes that are allowed here.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(content)) as opened:
                    width, height = opened.size
        except Image.DecompressionBombError:
            raise self._refuse_size("far too many") from None
        except Exception:  # Damaged files lead to errors of many types.
            raise HTTPException(415, "no image that can be read") from None
        if width * height > self._limits.pixels:
            raise self._refuse_size(f"{width}x{height}")
        try:
            return self._model.preprocess(content)
        except UserError as e:
            raise HTTPException(415, f"no image that can be read: {e}") from None

    def _refuse_size(self, size: str) -> HTTPException:
        return HTTPException(
            413, f"the image has {size} pixels: expected {self._limits.pixels:,} at most"
        )

    def _draw(self, image: np.ndarray) -> str:
        png = encode_png(overlay_rollout(self._model, image))
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"


async def _say_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _say_failure(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "this is a bug; the server's screen has more"}, 500)


async def _say_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # Nobody is there to read it.


def make_app(
    model: LoadedModel, *, limits: Limits | None = None, hosts: tuple[str, ...] = LOOPBACK
) -> Starlette:
    """The application.

    Args:
      model: that answers.
      limits: of what is taken.
      hosts: names under which the server is addressed, "*" for any. A page of another site can't
        use a name of its own for this server, then.

    Raises:
      UserError: the model has no trained classifier.
    """
    model.check_classifies()
    server = Server(model, limits or Limits())
    return Starlette(
        routes=[
            Route("/", server.show_page),
            Route("/healthz", server.say_health),
            Route("/openapi.json", server.describe),
            Route("/v1/predict", server.predict, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: _say_error,
            ClientDisconnect: _say_nothing,
            Exception: _say_failure,
        },
        lifespan=server.lifespan,
    )
