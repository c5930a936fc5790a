"""Answers that are made to make a verifier hang or crash, or to be accepted by mistake."""

from __future__ import annotations

import random
import string

_BOMBS = (
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "100000000!",
    r"\binom{100000000}{50000000}",
    r"\sum_{n=1}^{10000000} \frac{1}{n^2}",
    r"\int_0^{\infty} e^{-x^{x^x}} dx",
    r"\prod_{k=1}^{999999} k",
    r"\lim_{x \to 0} \frac{\sin(\tan x) - \tan(\sin x)}{x^{77}}",
    r"(x+y+z+1)^{500}",
    r"\sqrt[99]{\sqrt[98]{\sqrt[97]{x^{96}+1}}}",
    r"\sin(10^{10^{9}})",
    "1e999999999",
    "0." + "0" * 9_999 + "1",
    "1/0",
    r"\frac{0}{0}",
    r"\infty - \infty",
    r"x = x = x = x",
    r"\{x \in \mathbb{R} : x^x = x^{x^x}\}",
)
ODD_ANSWERS = (
    "",
    " ",
    "\x00",
    "\x00" * 1000,
    "\u202e12\u202c",
    "\u200f5\u200e",
    "\u2066\u2067\u2068\u2069",
    "\u200b5\u200b",
    "５",
    "²",
    "½",
    "Ⅻ",
    "−5",
    "e\u0301" * 500,
    "\ufffd",
    "\U0001f600" * 300,
    "漢字" * 500,
    "%s%n%x",
    "{0.__class__}",
    "${jndi:x}",
    "$(reboot)",
    "__import__('os').abort()",
    "[].__class__.__base__",
    "lambda: 1",
    "\\",
    "\\" * 1001,
    "{",
    "}",
    "{}" * 1000,
    "&" * 1000,
    r"\boxed{\boxed{\boxed{5}}}",
    r"\end{document}",
    r"\input{/etc/passwd}",
    r"\def\x{\x\x}\x",
    r"\newcommand{\a}{\a\a}\a",
    r"\begin{pmatrix} 1 & 2",
    r"\left( \right] \left\{",
    "nan",
    "inf",
    "None",
    "True",
    "\n" * 1000,
    "\t5\t",
    "\ud7ff",
)
_PIECES = (
    *(
        r"\frac",
        r"\sqrt",
        r"\left(",
        r"\right)",
        r"\text{",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        r"\sum_",
        r"\int",
        r"\cup",
    ),
    *(
        "{",
        "}",
        "^",
        "_",
        "(",
        ")",
        "[",
        "]",
        "=",
        "<",
        ",",
        ";",
        "&",
        r"\\",
        "$",
        "%",
        "!",
        "x",
        "y",
        "7",
        "0.5",
        "A",
        "é",
        "\u202e",
    ),
)


def _nested(rng: random.Random) -> str:
    depth = rng.choice((10, 100, 1000, 5000))
    opening, closing = rng.choice(
        (
            ("{", "}"),
            ("(", ")"),
            ("[", "]"),
            (r"\frac{1}{", "}"),
            (r"\sqrt{", "}"),
            ("x^{", "}"),
            (r"\left(", r"\right)"),
            (r"\text{", "}"),
            ("-", ""),
            (r"\{", r"\}"),
            ("{[", "]}"),
        )
    )
    return opening * depth + "5" + closing * rng.choice((depth, depth - 1))


def _digits(rng: random.Random) -> str:
    digits = "".join(rng.choices(string.digits, k=rng.choice((100, 1_000, 10_000))))
    return rng.choice(
        (digits, f"-{digits}", f"0.{digits}", f"{digits}.{digits}", rf"\frac{{{digits}}}{{7}}", f"2^{{{digits[:12]}}}")
    )


def _pieces(rng: random.Random) -> str:
    return "".join(rng.choices(_PIECES, k=rng.randrange(1, 60)))


def _text(rng: random.Random) -> str:
    """Any characters, also some that are not assigned."""
    points = (
        rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
        for _ in range(rng.randrange(200))
    )
    return "".join(map(chr, points))


def adversarial_answers(count: int, seed: int = 0) -> list[str]:
    """Return `count` answers, of which the first are the same for every seed."""
    rng = random.Random(seed)
    fixed = [
        answer for pair in zip(ODD_ANSWERS, [*_BOMBS, *ODD_ANSWERS], strict=False) for answer in dict.fromkeys(pair)
    ]
    drawn = [rng.choice((_nested, _digits, _pieces, _pieces, _text))(rng) for _ in range(count)]
    return [*fixed, *drawn][:count]
