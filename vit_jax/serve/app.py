# SPDX-License-Identifier: Apache-2.0
"""The web application: one page for people, and predictions over HTTP for programs."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import importlib.resources
import io
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import vit_jax
from vit_jax.evaluators.prompts import find_templates
from vit_jax.inference.draw import encode_png
from vit_jax.inference.figures import has_attention, overlay_rollout
from vit_jax.inference.labels import TextClasses
from vit_jax.inference.masks import BATCH_SIZE, make_mask
from vit_jax.inference.model import IMAGE_EMBED, LoadedModel
from vit_jax.models.interface import takes_any_size
from vit_jax.pages.html import STYLE
from vit_jax.serve.batches import Batcher
from vit_jax.serve.form import FORM, OVERHEAD, describe_encoded, is_form, read_form
from vit_jax.utils.errors import UserError
from vit_jax.utils.palette import make_palette
from vit_jax.utils.text import escape_html

LOOPBACK = ("127.0.0.1", "localhost")

_Options = TypeVar("_Options", bound=BaseModel)

# The page loads nothing from other hosts and sends nothing to them.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_RETRY_S = 1
# Bytes a second of the slowest upload.
MIN_RATE = 2**16
# Most texts and characters in the labels of a request, and sets of labels that are kept embedded.
MAX_LABELS, _MAX_LABEL_CHARACTERS, _KEPT = 1000, 16_000, 64
# Heading, alternative text and caption of the overlay on the page, by whether it shows a mask.
_CARDS = {
    False: (
        "Attention",
        "The image as the model sees it, bright where it attends",
        "The model attends to the bright areas, over all its layers: a hint, not an explanation.",
    ),
    True: (
        "Mask",
        "The image below the colours of the classes",
        "Each pixel has the colour of its class.",
    ),
}
# Refused before the request was read: the rest of it is not.
_CLOSE = {"Connection": "close"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server accepts.

    Attributes:
      bytes: size of an image file.
      pixels: size of an image, checked before it is decoded.
      requests: number of concurrent requests; further ones get status 503.
      batch_size: number of images that are computed together.
      upload_s: seconds for an upload to arrive, and one more for every `MIN_RATE` bytes.
    """

    bytes: int = 10 * 2**20
    pixels: int = 50_000_000
    requests: int = 64
    batch_size: int = 16
    upload_s: float = 10.0


class Health(BaseModel, extra="forbid"):
    """The answer of `GET /healthz`."""

    status: Literal["ok"]
    model: str
    classes: int


class Error(BaseModel, extra="forbid"):
    """The answer to every request that fails."""

    error: str


class Predictor:
    """Applies a model to image files, in batches across requests.

    Args:
      model: a classifier, a model of images and texts, or one that finds the class of each pixel.
      limits: what is accepted.
      labels: of a model of images and texts, for requests without any.
      templates: prompts of all labels, see `LoadedModel.embed_labels`.
    """

    def __init__(
        self,
        model: LoadedModel,
        limits: Limits,
        *,
        labels: TextClasses | None = None,
        templates: str | None = None,
    ):
        self._model, self._limits = model, limits
        self._labels = labels
        # One call at a time has the device, so that equal labels are embedded once.
        self._embed = functools.lru_cache(_KEPT)(
            lambda labels: model.embed_labels(labels, templates=templates)
        )
        if model.segmentation is None:
            layer = "logits" if model.texts is None else IMAGE_EMBED
            compute, max_rows = functools.partial(model.features, layer=layer), limits.batch_size
        else:
            compute, max_rows = model.pixel_outputs, min(limits.batch_size, BATCH_SIZE)
        self._batcher = Batcher(compute, max_rows=max_rows)
        self._num_requests = 0

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs while the application serves requests."""
        self._decoders = CapacityLimiter(4)
        async with self._batcher.running():
            yield

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Counts a request while it is answered, or raises status 503."""
        if self._num_requests >= self._limits.requests:
            headers = {"Retry-After": str(_RETRY_S)} | _CLOSE
            raise HTTPException(503, "too many requests at a time", headers=headers)
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def predict(
        self, content: bytes, *, top_k: int, overlay: bool, labels: str | None = None
    ) -> dict[str, Any]:
        """The answer to `POST /v1/predict` with classes of images, for the bytes of a file."""
        started = time.perf_counter()
        classes = await self._find_classes(labels)
        names = self._model.list_names() if classes is None else classes.names
        image = await to_thread.run_sync(self._prepare, content, limiter=self._decoders)
        prediction = self._model.judge((await self._batcher(image))[None], classes)
        drawn = None
        if overlay and has_attention(self._model) and not takes_any_size(self._model.module):
            drawn = await to_thread.run_sync(self._draw, image, limiter=self._batcher.device)
        return {
            "predictions": [
                {
                    "label": label,
                    "class": names[label],
                    "probability": float(prediction.probabilities[0, label]),
                }
                for label in prediction.top(top_k)[0].tolist()
            ],
            "milliseconds": round(1e3 * (time.perf_counter() - started), 3),
            "overlay": drawn,
        }

    async def segment(self, content: bytes, *, overlay: bool) -> dict[str, Any]:
        """The answer to `POST /v1/predict` with classes of pixels, for the bytes of a file."""
        started = time.perf_counter()
        image = await to_thread.run_sync(self._prepare, content, limiter=self._decoders)
        logits = await self._batcher(image)
        answer = await to_thread.run_sync(
            self._draw_mask, content, logits, overlay, limiter=self._decoders
        )
        return answer | {"milliseconds": round(1e3 * (time.perf_counter() - started), 3)}

    async def _find_classes(self, labels: str | None) -> TextClasses | None:
        """The classes of a request: None for those of the model itself."""
        if self._model.texts is None:
            return None
        if labels is None:
            if self._labels is None:
                text = "labels are missing: expected texts separated by commas, such as a cat,a dog"
                raise HTTPException(400, text)
            return self._labels
        texts = tuple(labels.split(","))
        if len(texts) > MAX_LABELS:
            text = f"labels: {len(texts):,} texts: expected {MAX_LABELS:,} at most"
            raise HTTPException(400, text)
        try:
            return await to_thread.run_sync(self._embed, texts, limiter=self._batcher.device)
        except UserError as e:
            raise HTTPException(400, str(e)) from None

    def _prepare(self, content: bytes) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(content)) as opened:
                width, height = opened.size
        except Image.DecompressionBombError:
            raise self._refuse_size("far too many") from None
        except Exception:  # Damaged files lead to exceptions of many types.
            raise HTTPException(415, "not an image that can be read") from None
        if width * height > self._limits.pixels:
            raise self._refuse_size(f"{width}x{height}")
        try:
            return self._model.preprocess(content)
        except UserError as e:
            raise HTTPException(415, f"not an image that can be read: {e}") from None

    def _refuse_size(self, size: str) -> HTTPException:
        return HTTPException(
            413, f"the image has {size} pixels: expected {self._limits.pixels:,} at most"
        )

    def _draw(self, image: np.ndarray) -> str:
        return _make_url(encode_png(overlay_rollout(self._model, image)))

    def _draw_mask(self, content: bytes, logits: np.ndarray, overlay: bool) -> dict[str, Any]:
        mask = make_mask(self._model, content, logits)
        shares, palette = mask.shares, make_palette()
        order: list[int] = np.argsort(-shares, kind="stable").tolist()
        return {
            "predictions": [
                {
                    "label": label,
                    "class": mask.class_names[label],
                    "share": float(shares[label]),
                    "color": f"#{palette[label].tobytes().hex()}",
                }
                for label in order
                if shares[label]
            ],
            "mask": _make_url(mask.encode()),
            "overlay": _make_url(mask.encode_overlay(), kind="jpeg") if overlay else None,
        }


def _make_url(picture: bytes, *, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def make_app(
    model: LoadedModel,
    *,
    limits: Limits | None = None,
    hosts: tuple[str, ...] = LOOPBACK,
    labels: TextClasses | None = None,
    templates: str | None = None,
) -> FastAPI:
    """The application.

    Args:
      model: a classifier; a model of images and texts, whose classes are the labels of each
        request; or a model that finds the class of each pixel, whose answers have masks.
      limits: what the server accepts.
      labels: of a model of images and texts, for requests without any.
      templates: prompts of all labels, see `LoadedModel.embed_labels`.
      hosts: names under which the server may be addressed, "*" for any. A page of another site
        cannot reach it under a name of its own then.

    Raises:
      UserError: the model has no trained classifier, or the tokenizer of its texts is not known, or
        a template is wrong.
    """
    by_text, by_pixel = model.texts is not None, model.segmentation is not None
    if model.texts is None:
        if not by_pixel:
            model.check_classifies()
    else:
        model.texts.encode("")
        if templates is not None:
            find_templates(templates, key="templates")
    limits = limits or Limits()
    classes = MAX_LABELS if by_text else model.num_classes
    predictor = Predictor(model, limits, labels=labels, templates=templates)
    expected = {} if by_pixel else {"top_k": f"1 to {classes}"}
    expected["overlay"] = "true or false"
    if by_text:
        expected["labels"] = f"texts separated by commas, {_MAX_LABEL_CHARACTERS:,} characters"

    class PixelOptions(BaseModel, extra="forbid"):
        overlay: Literal["true", "false"] = "false"

    class Options(BaseModel, extra="forbid"):
        top_k: Annotated[int, BeforeValidator(_check_digits)] = Field(
            min(5, classes), ge=1, le=classes
        )
        overlay: Literal["true", "false"] = "false"

    class TextOptions(Options):
        labels: str | None = Field(
            None,
            max_length=_MAX_LABEL_CHARACTERS,
            description="The texts of the classes, separated by commas. The default is that of the "
            "server, if it has one.",
        )

    accepted_options: Any = TextOptions if by_text else PixelOptions if by_pixel else Options

    class Prediction(BaseModel, extra="forbid"):
        label: int = Field(ge=0, le=classes - 1)
        name: str = Field(alias="class")
        probability: float = Field(ge=0, le=1)

    class Share(BaseModel, extra="forbid"):
        label: int = Field(ge=0, le=classes - 1)
        name: str = Field(alias="class")
        share: float = Field(gt=0, le=1, description="Of the pixels.")
        color: str = Field(description="In the mask and the overlay, as #rrggbb.")

    class PixelAnswer(BaseModel, extra="forbid"):
        predictions: list[Share] = Field(min_length=1, max_length=classes)
        mask: str = Field(
            description="A PNG with a palette as a data URL, whose values are the labels. It has "
            "the size of the image, or that of the prepared image where the preparation does more "
            "than to resize."
        )
        overlay: str | None = Field(
            description="A JPEG as a data URL: the image below the colours of the classes. null "
            "unless requested."
        )
        milliseconds: float = Field(ge=0)

    class Answer(BaseModel, extra="forbid"):
        predictions: list[Prediction] = Field(min_length=1, max_length=classes)
        milliseconds: float = Field(ge=0)
        overlay: str | None = Field(
            description="A PNG as a data URL: the model's attention, drawn over the image as the "
            "model sees it. null unless requested, and for a model without attention, or of images "
            "of any size."
        )

    async def refuse_options(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = first["loc"][-1]
        if name in expected:
            text = f"{name}={str(first['input'])[:20]!r}: expected {expected[name]}"
        else:
            *others, last = expected
            names = f"{', '.join(others)} or {last}" if others else last
            text = f"{str(name)[:20]!r} is unknown; expected {names}"
        return JSONResponse({"error": text}, 400, headers=_CLOSE)

    # The interactive pages of FastAPI load scripts from another host.
    app = FastAPI(
        title="vit_jax",
        version=vit_jax.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=predictor.lifespan,
        exception_handlers={
            HTTPException: _report_error,
            RequestValidationError: refuse_options,
            ClientDisconnect: _report_nothing,
            Exception: _report_bug,
        },
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        text = importlib.resources.files("vit_jax.serve").joinpath("page.html").read_text("utf-8")
        height, width, _ = model.image_shape
        kind = "compares images with texts" if by_text else f"{classes} classes"
        facts = f"{kind}{' of pixels' if by_pixel else ''}, images of {height}×{width}"
        text = text.replace("%STYLE%", STYLE).replace("%HIDDEN%", "" if by_text else "hidden")
        for name, value in zip(("DRAWN", "ALT", "CAPTION"), _CARDS[by_pixel], strict=True):
            text = text.replace(f"%{name}%", value)
        given = "" if labels is None else ", ".join(labels.names)
        for name, value in (("SOURCE", model.source), ("FACTS", facts), ("LABELS", given)):
            text = text.replace(f"%{name}%", escape_html(value))
        return HTMLResponse(text, headers=_HEADERS)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", operation_id="health", summary="Whether the model is ready")
    async def report_health() -> Health:
        count = classes if not by_text else 0 if labels is None else len(labels.names)
        return Health(status="ok", model=model.source, classes=count)

    errors = {
        400: "a parameter is unknown or has a value that is not allowed, or a form is not whole",
        413: f"more than {limits.bytes:,} bytes or {limits.pixels:,} pixels",
        415: "not an image that can be read",
        503: "too many concurrent requests; try again after Retry-After seconds",
        "default": "any other error",
    }
    file = {"type": "string", "contentMediaType": "image/*"}
    fields = {"file": file} | {name: {"type": "string"} for name in expected}
    form = {"type": "object", "properties": fields, "required": ["file"]}
    accepted = {"image/*": {"schema": file}, FORM: {"schema": form}}
    body = (
        "The bytes of a JPEG, PNG, WebP, BMP or GIF file; or a form with one file, under any name, "
        "which may have the parameters of the query as fields."
    )

    @app.post(
        "/v1/predict",
        operation_id="predict",
        summary="The mask of an image, and the classes in it"
        if by_pixel
        else "The most probable classes of an image",
        response_model=PixelAnswer if by_pixel else Answer,
        responses={code: {"model": Error, "description": text} for code, text in errors.items()},
        openapi_extra={"requestBody": {"required": True, "description": body, "content": accepted}},
    )
    async def predict(request: Request, options: Annotated[accepted_options, Query()]) -> Any:  # pyright: ignore[reportInvalidTypeForm]: made above
        _check_once(request)
        with predictor.admit():
            content = await _read_body(request, limits)
            kind = request.headers.get("Content-Type", "")
            unnamed = is_form(kind) and b"filename" not in content
            if is_form(kind):
                content, fields = _take_file(kind, content, limits)
                options = _add_fields(options, fields, request)
            overlay = options.overlay == "true"
            given = getattr(options, "labels", None)
            try:
                if by_pixel:
                    return await predictor.segment(content, overlay=overlay)
                return await predictor.predict(
                    content, top_k=options.top_k, overlay=overlay, labels=given
                )
            except HTTPException as e:
                if e.status_code == 415 and unnamed:
                    hint = "the form has no file: expected one, as curl -F file=@FILE sends it"
                    raise HTTPException(415, f"{e.detail}; {hint}") from None
                if e.status_code == 415 and (hint := describe_encoded(kind, content)):
                    raise HTTPException(415, f"{e.detail}; {hint}") from None
                raise

    return app


def _check_once(request: Request) -> None:
    counts = Counter(name for name, _ in request.query_params.multi_items())
    for name, count in counts.items():
        if count > 1:
            text = f"{name} is given {count} times; expected once"
            raise HTTPException(400, text, headers=_CLOSE)


def _take_file(kind: str, body: bytes, limits: Limits) -> tuple[bytes, dict[str, str]]:
    """The one file of a form, and its other fields."""
    try:
        files, fields = read_form(kind, body)
    except ValueError as e:
        raise HTTPException(400, str(e)) from None
    if len(files) != 1:
        raise HTTPException(400, f"the form has {len(files)} files: expected one image")
    if len(files[0]) > limits.bytes:
        raise _refuse_bytes(limits)
    if not files[0]:
        raise HTTPException(415, "the file in the form is empty: expected the bytes of an image")
    return files[0], fields


def _add_fields(options: _Options, fields: dict[str, str], request: Request) -> _Options:
    """The options of the query together with those of a form."""
    for name in fields.keys() & request.query_params.keys():
        raise HTTPException(400, f"{name} is given 2 times; expected once")
    try:
        return type(options)(**{**request.query_params, **fields})
    except ValidationError as e:
        raise RequestValidationError(e.errors()) from None


def _check_digits(value: object) -> object:
    """Refuses what `int` would take besides digits, and numbers of thousands of digits."""
    if not re.fullmatch("[0-9]{1,9}", str(value)):
        raise ValueError("expected up to 9 digits")
    return value


def _refuse_bytes(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the image has more than {limits.bytes:,} bytes", headers=_CLOSE)


async def _read_body(request: Request, limits: Limits) -> bytes:
    refusal = _refuse_bytes(limits)
    form = is_form(request.headers.get("Content-Type", ""))
    most = limits.bytes + (OVERHEAD if form else 0)
    stated = request.headers.get("Content-Length", "")
    # A number that is longer is larger too, and may have more digits than `int` takes.
    if stated.isdecimal() and (len(stated) > 20 or int(stated) > most):
        raise refusal
    content = bytearray()
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(limits.upload_s) as timeout:
            async for chunk in request.stream():
                content += chunk
                if len(content) > most:
                    raise refusal
                timeout.reschedule(started + limits.upload_s + len(content) / MIN_RATE)
    except TimeoutError:
        text = f"the upload takes too long: {len(content):,} bytes arrived"
        raise HTTPException(408, text, headers=_CLOSE) from None
    if not content:
        raise HTTPException(415, "the body is empty: expected the bytes of an image")
    return bytes(content)


async def _report_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text, path = error.detail, request.url.path[:60]
    if error.status_code == 404:
        text = f"there is no {path}: expected /v1/predict; /openapi.json describes it"
    elif error.status_code == 405:
        text = f"{request.method} {path}: expected {(error.headers or {}).get('Allow', 'POST')}"
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)


async def _report_bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "this is a bug; the server's log has the details"}, 500)


async def _report_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # The client has gone away.
