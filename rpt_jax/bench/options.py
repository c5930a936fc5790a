"""Command-line options that several benches share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable

from rpt_jax.config import PolicyConfig
from rpt_jax.config.schema import ATTENTIONS, HEAD_PRECISIONS, REMATS
from rpt_jax.errors import UserError
from rpt_jax.model.model_config import ModelConfig, preset

_DEFAULT_MODEL = ModelConfig(
    layers=6, width=384, heads=6, kv_heads=2, head_size=64, ffn=1024, vocab=4096, qkv_bias=True
)
_SIZES = ("layers", "width", "heads", "kv_heads", "head_size", "ffn", "vocab")


def positive(text: str) -> int:
    """Parse the value of an option that counts something. Raises: ArgumentTypeError, if it is not an integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer, at least 1")
    return int(text)


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of options that count something and are at least `least`. It raises ArgumentTypeError."""

    def parse(text: str) -> int:
        value = positive(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
        return value

    return parse


def not_negative(text: str) -> int:
    """Parse the value of an option that may be 0. Raises: ArgumentTypeError, if it is not an integer of at least 0."""
    return 0 if text == "0" else positive(text)


def positive_number(text: str) -> float:
    """Parse the value of an option. Raises: ArgumentTypeError, if it is not a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} must be a number above 0")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add a preset, and sizes that replace the preset's."""
    help_text = "preset of policy.preset; default: 6 layers of width 384, vocabulary 4096"
    parser.add_argument("--preset", help=help_text)
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, help=f"replaces the preset's {name}")


def chosen_model(options: argparse.Namespace) -> ModelConfig:
    """Return the model that the options of `add_model_options` describe.

    Raises:
      UserError: the preset is unknown, or there is no model of these sizes.
    """
    config = preset(options.preset, field="--preset") if options.preset else _DEFAULT_MODEL
    sizes = {name: getattr(options, name) for name in _SIZES}
    config = dataclasses.replace(config, **{name: size for name, size in sizes.items() if size is not None})
    if config.heads % config.kv_heads:
        raise UserError(f"--heads={config.heads} must be a multiple of --kv-heads={config.kv_heads}.", field="--heads")
    if config.head_size % 2:
        raise UserError(f"--head-size={config.head_size} must be even: it is rotated in pairs.", field="--head-size")
    return config


def add_compute_options(parser: argparse.ArgumentParser, remat: str, dtype: bool = True) -> None:
    """Add the compute dtype and the head's precision, the attention, and the rematerialization, whose default is `remat`."""
    if dtype:
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        parser.add_argument("--head-precision", choices=HEAD_PRECISIONS, default="tensorfloat32")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    parser.add_argument("--remat", choices=[remat for remat in REMATS if remat != "auto"], default=remat)


def policy_config(options: argparse.Namespace) -> PolicyConfig:
    """Return what the options of `add_compute_options` with a dtype say."""
    return PolicyConfig(
        dtype=options.dtype, head_precision=options.head_precision, remat=options.remat, attention=options.attention
    )


def add_logit_chunk_option(parser: argparse.ArgumentParser) -> None:
    """Add --logit-chunk-tokens."""
    parser.add_argument("--logit-chunk-tokens", type=positive, default=4096, help="tokens whose logits exist at once")
