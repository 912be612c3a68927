# SPDX-License-Identifier: Apache-2.0
r"""Serves a trained model on this machine: a web page, and HTTP for programs.

The page takes an image and shows its most probable classes and where the model looks. Programs
send the bytes of an image to /v1/predict, or a form with an image in it, and get JSON;
/openapi.json describes the interface. The classes of a model of images and texts are the texts
that each request has, or those of --labels. A model that finds the class of each pixel answers with
the mask, and with the share of the pixels that each class has. Only this machine can reach the
server unless --host is given. Ctrl-C ends it.

Examples:
  python -m vit_jax.serve runs/digits
  python -m vit_jax.serve --workdir=runs/averaged --checkpoint=last --params=ema --port=8080
  python -m vit_jax.serve runs/clip --labels='a cat,a dog'
  python -m vit_jax.serve runs/digits_segment
  python -m vit_jax.serve --checkpoint=vit.safetensors --labels=names.txt
  curl --data-binary @photo.jpg 'http://127.0.0.1:8000/v1/predict?top_k=3'
  curl -F file=@photo.jpg -F top_k=3 http://127.0.0.1:8000/v1/predict
"""

import argparse
import contextlib
import importlib.util
import socket
from collections.abc import Sequence

from vit_jax.config.load import parse_overrides
from vit_jax.inference.source import (
    add_source,
    check_source,
    load_labels,
    log_classes,
    log_source,
    read_source,
)
from vit_jax.observe.console import log, set_up
from vit_jax.utils.command import CommandParser, check_positive, run_command
from vit_jax.utils.errors import UserError
from vit_jax.utils.signals import importing

# Seconds that open requests may take after Ctrl-C.
_SHUTDOWN_S = 3


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments, without overrides of the config; `UserError` if one is invalid."""
    parser = CommandParser(prog="python -m vit_jax.serve", description=__doc__)
    add_source(parser, texts="classes")
    add = parser.add_argument
    add(
        "--port",
        type=int,
        default=8000,
        help="Listen on this port; 0 takes any that is free. The default is %(default)s.",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="Listen on this address; 0.0.0.0 lets the whole network in. The default is "
        "%(default)s.",
    )
    add(
        "--max_mib",
        type=float,
        default=10,
        metavar="MIB",
        help="Refuse larger image files, in MiB. The default is %(default)s.",
    )
    add(
        "--max_pixels",
        type=int,
        default=50_000_000,
        help="Refuse images with more pixels. The default is %(default)s.",
    )
    add(
        "--max_requests",
        type=int,
        default=64,
        help="Serve at most this many requests at the same time. The default is %(default)s.",
    )
    add(
        "--batch_size",
        type=int,
        default=16,
        help="Compute at most this many images at a time. The default is %(default)s.",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port={args.port}: expected 0 to {2**16 - 1}")
    check_positive(args, "max_mib", "max_pixels", "max_requests", "batch_size")
    check_source(args)
    return args


def open_socket(host: str, port: int) -> socket.socket:
    """Opens a socket that listens.

    Raises:
      UserError: the port is taken, or this machine does not have the address.
    """
    try:
        return socket.create_server((host, port))
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"--port={port} of --host={host} can't be used: {reason}; expected a free port of this "
            "machine, or 0 for any"
        ) from None


def main(argv: Sequence[str]) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    overrides, rest = parse_overrides(list(argv))
    args = parse_arguments(rest)
    set_up(quiet=False)
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"vit_jax.serve needs {name}: pip install 'vit_jax[serve]'")
    with importing():
        import numpy as np
        import uvicorn

        from vit_jax.inference.figures import has_attention
        from vit_jax.inference.model import IMAGE_EMBED
        from vit_jax.serve.app import LOOPBACK, Limits, make_app
        from vit_jax.serve.protocol import Protocol

    with open_socket(args.host, args.port) as listening:
        model = read_source(args, overrides)
        with_labels = model.texts is None or args.labels is not None
        labels = load_labels(args, model) if with_labels else None
        log_source(model)
        if labels is not None:
            log_classes(args, labels)
        local = args.host in LOOPBACK
        limits = Limits(
            bytes=int(args.max_mib * 2**20),
            pixels=args.max_pixels,
            requests=args.max_requests,
            batch_size=args.batch_size,
        )
        app = make_app(
            model,
            limits=limits,
            hosts=LOOPBACK if local else ("*",),
            labels=labels,
            templates=args.templates,
        )
        blank = np.zeros(model.image_shape, np.uint8)
        # Compiles before the first request.
        if model.segmentation is not None:
            model.pixel_outputs(blank[None])
        else:
            model.features(blank, "logits" if model.texts is None else IMAGE_EMBED)
            if has_attention(model):
                model.attention(blank)
        if not local:
            log(f"--host={args.host}: who can reach this machine can use it, without a password")
        shown = args.host if local else socket.gethostname()
        log(f"http://{shown}:{listening.getsockname()[1]} is ready; Ctrl-C ends it")
        config = uvicorn.Config(
            app,
            http=Protocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        # uvicorn raises it again after an orderly shutdown.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
        log("stopped")


if __name__ == "__main__":
    run_command(main)
