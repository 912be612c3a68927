# SPDX-License-Identifier: Apache-2.0
"""The description of the HTTP interface, after OpenAPI 3.1."""

from typing import Any

import vit_jax


def describe_api(*, classes: int, max_bytes: int, max_pixels: int) -> dict[str, Any]:
    """The description as JSON.

    Args:
      classes: of the model.
      max_bytes: of an image.
      max_pixels: likewise.
    """
    prediction = _object(
        label={"type": "integer", "minimum": 0, "maximum": classes - 1},
        **{"class": {"type": "string"}},
        probability={"type": "number", "minimum": 0, "maximum": 1},
    )
    predicted = _object(
        predictions={"type": "array", "items": prediction, "minItems": 1, "maxItems": classes},
        milliseconds={"type": "number", "minimum": 0},
        overlay={
            "type": ["string", "null"],
            "description": "A PNG as a data URL: what the model attends to, over the image as it "
            "sees it. null unless it was asked for, and of a model without attention.",
        },
    )
    parameters = [
        {
            "name": "top_k",
            "in": "query",
            "schema": {"type": "integer", "minimum": 1, "maximum": classes, "default": 5},
        },
        {"name": "overlay", "in": "query", "schema": {"type": "boolean", "default": False}},
    ]
    errors = {
        "400": "a parameter is none that is described here",
        "413": f"more than {max_bytes:,} bytes or {max_pixels:,} pixels",
        "415": "no image that can be read",
        "503": "too many requests at a time; come again after Retry-After seconds",
    }
    health = _object(status={"const": "ok"}, model={"type": "string"}, classes={"type": "integer"})
    image = {"image/*": {"schema": {"type": "string", "contentMediaType": "image/*"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "vit_jax", "version": vit_jax.__version__},
        "paths": {
            "/v1/predict": {
                "post": {
                    "summary": "The most probable classes of an image",
                    "operationId": "predict",
                    "parameters": parameters,
                    "requestBody": {
                        "required": True,
                        "description": "The bytes of a JPEG, PNG, WebP, BMP or GIF file.",
                        "content": image,
                    },
                    "responses": {"200": _response("classes", predicted)}
                    | {code: _error(text) for code, text in errors.items()},
                }
            },
            "/healthz": {
                "get": {
                    "summary": "Whether the model is ready",
                    "operationId": "health",
                    "responses": {"200": _response("it is", health)},
                }
            },
        },
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _response(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _error(description: str) -> dict[str, Any]:
    return _response(description, _object(error={"type": "string"}))
